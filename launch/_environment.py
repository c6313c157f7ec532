"""Variables with which what starts the processes of a run tells each its place.

They stand for flags of the command, so that all processes run the same command.
"""

COORDINATOR_ADDRESS = "MFJAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "MFJAX_NUM_PROCESSES"
PROCESS_ID = "MFJAX_PROCESS_ID"
RESUME_COMMAND = "MFJAX_RESUME_COMMAND"  # What a person types to go on with the run.
