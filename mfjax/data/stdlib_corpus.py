"""The quickstart corpus: the running Python's own standard library, without a download.

Domain `code` holds the .py sources, domain `prose` each file's docstrings and the texts of
`pydoc_data.topics`. A document's key is its file (or topic), so that a held-out file's docstrings
are held out too; a text of the validation split occurs nowhere in `train`.
"""

import ast
import hashlib
import json
import os
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator

from mfjax.data.documents import JSONL, InputFile, is_held_out

# Installed packages are not the standard library. Its tests are 60 % of its bytes, much of them
# tables of numbers; pydoc's topics are one long literal whose texts are in `prose`.
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
SPLIT_FIELD = "file"


def write_stdlib_corpus(folder: pathlib.Path, validation_fraction: float) -> list[InputFile]:
  """Write `code` and `prose` as JSONL files with fields `text` and `file`, and return them.

  Raises:
    ValueError: this Python comes without the sources of its standard library.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  code = dict(_sources(root))
  if not code:
    raise ValueError(f"{root} holds no .py sources: give --input=NAME=PATH instead of --corpus")
  prose = {name: list(_docstrings(source)) for name, source in code.items()}
  prose |= {f"topic {name}": [text] for name, text in _topics(root)}
  files = []
  for domain, parts in ("code", {name: [text] for name, text in code.items()}), ("prose", prose):
    documents = without_repeats(parts, validation_fraction)
    lines = [json.dumps({"text": text, SPLIT_FIELD: key}) + "\n" for key, text in documents]
    data = "".join(lines).encode()
    file = folder / f"corpus-{domain}.jsonl"
    file.write_bytes(data)
    version = hashlib.sha256(data).hexdigest()
    files.append(InputFile(domain, str(file), JSONL, len(data), version))
  return files


def _sources(root: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yield (relative path, text) of the library's sources, sorted; what is not UTF-8 is left out."""
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
    paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
  for path in sorted(paths):
    name = path.relative_to(root).as_posix()
    try:
      text = path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
      continue
    if name != _TOPICS and text.strip():
      yield name, text


def _docstrings(source: str) -> Iterator[str]:
  try:
    with warnings.catch_warnings():  # Old sources hold invalid escapes.
      warnings.simplefilter("ignore")
      tree = ast.parse(source)
  except SyntaxError:
    return
  kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
  for node in ast.walk(tree):
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
      yield text


def _topics(root: pathlib.Path) -> list[tuple[str, str]]:
  try:
    tree = ast.parse((root / _TOPICS).read_bytes())
  except (OSError, SyntaxError):
    return []
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      return sorted(ast.literal_eval(node.value).items())
  return []


def without_repeats(parts: dict[str, list[str]], fraction: float) -> list[tuple[str, str]]:
  """Return (key, text) with each part said once; what is held out is said there."""
  seen: set[str] = set()
  documents = {}
  for key in sorted(parts, key=lambda key: (not is_held_out(key, fraction), key)):
    fresh = []
    for text in parts[key]:
      if text not in seen:
        seen.add(text)
        fresh.append(text)
    if fresh:
      documents[key] = "\n\n".join(fresh)
  return sorted(documents.items())
