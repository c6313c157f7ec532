import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "targets" / "Dockerfile").read_text()


def test_the_image_gets_what_an_installation_needs():
  copied = {
    source
    for line in re.findall(r"^COPY (.*)$", TEXT, re.MULTILINE)
    for source in line.split()[:-1]
  }
  assert all((ROOT / source).exists() for source in copied)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
  files = [project["project"]["readme"], *project["project"]["license-files"]]
  constraints = re.findall(r"-c (\S+)", TEXT)
  assert copied == {"pyproject.toml", *packages, *files, *constraints}
  named = set(re.findall(r"EXTRA=(\w+)", TEXT))
  assert named == {"tpu", "cuda"}
  [installed] = re.findall(r"\.\[\$EXTRA,(\w+)\]", TEXT)
  assert installed == "gcs"  # Runs in a cloud read and write gs:// paths.
  assert named | {installed} <= set(project["project"]["optional-dependencies"])
