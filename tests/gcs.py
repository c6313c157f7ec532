"""A GCS emulator in a process of its own: `gcp-storage-emulator` with the conditions of real GCS.

TensorStore's databases rest on conditional requests and on the generation of what was read, which
the emulator leaves out; ArrayRecord asks for the last bytes of a file.

  python tests/gcs.py PORT
"""

import contextlib
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

BUCKET, FORBIDDEN = "mfjax", "forbidden"


def environment(port: int) -> dict[str, str]:
  """Return the variables with which gcsfs, TensorStore and ArrayRecord talk to the emulator."""
  url = f"http://127.0.0.1:{port}"
  return {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "NO_GCE_CHECK": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GS_TOKEN": "anon",
    "FSSPEC_GCS_TOKEN": "anon",
  }


@contextlib.contextmanager
def emulator() -> Iterator[int]:
  """Run an emulator with an empty bucket; yield its port."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [sys.executable, str(pathlib.Path(__file__)), str(port)], stderr=subprocess.DEVNULL
  )
  try:
    for _ in range(100):
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        break
      assert process.poll() is None, "the emulator ended"
      time.sleep(0.1)
    yield port
  finally:
    process.kill()
    process.wait()


def _serve(port: int) -> None:
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  lock = threading.RLock()
  plain = {name: getattr(objects, name) for name in ("download", "get", "insert")}

  def generation(storage, bucket, name):
    try:
      return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
      return "0"

  def download(request, response, storage, *args, **kwargs):
    with lock:
      bucket, name = request.params["bucket_name"], request.params["object_id"]
      found = generation(storage, bucket, name)
      response["x-goog-generation"] = found
      if found != "0" and request.query.get("ifGenerationNotMatch") == [found]:
        response.status = HTTPStatus.NOT_MODIFIED
        return
      last = re.fullmatch(r"bytes=-(\d+)", request.get_header("range", ""))
      if last and found != "0":
        size = len(storage.get_file(bucket, name))
        start = max(0, size - int(last[1]))
        headers = request._request_handler.headers
        headers.replace_header("range", f"bytes={start}-{size - 1}")
      plain["download"](request, response, storage, *args, **kwargs)

  def get(request, response, storage, *args, **kwargs):
    if request.query.get("alt") == ["media"]:
      download(request, response, storage, *args, **kwargs)
    else:
      plain["get"](request, response, storage, *args, **kwargs)

  def insert(request, response, storage, *args, **kwargs):
    with lock:
      wanted = request.query.get("ifGenerationMatch")
      if wanted and request.query.get("name"):
        name = request.query["name"][0]
        if generation(storage, request.params["bucket_name"], name) != wanted[0]:
          response.status = HTTPStatus.PRECONDITION_FAILED
          return
      plain["insert"](request, response, storage, *args, **kwargs)

  def move(request, response, storage, *args, **kwargs):
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    try:
      content, found = storage.get_file(bucket, name), storage.get_file_obj(bucket, name)
    except NotFound:
      response.status = HTTPStatus.NOT_FOUND
      return
    moved = found | {"name": request.params["target"], "generation": str(time.time_ns())}
    storage.create_file(bucket, moved["name"], content, moved)
    storage.delete_file(bucket, name)
    response.json(moved)

  def refuse(request, response, storage, *args, **kwargs):
    response.status = HTTPStatus.FORBIDDEN
    response.json({"error": {"code": 403, "message": "storage.objects.list is denied"}})

  # Before `server` puts them in its table.
  objects.download, objects.get, objects.insert = download, get, insert
  from gcp_storage_emulator import server

  route = (
    r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<target>[^/]+)$"
  )
  forbidden = rf".*/b/{FORBIDDEN}(?P<rest>/.*)?"
  refused = dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), refuse)
  server.HANDLERS = ((forbidden, refused), (route, {"POST": move}), *server.HANDLERS)
  server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
  _serve(int(sys.argv[1]))
