"""Several processes as one job: start, agreement, stopping together, and ending when one fails."""
