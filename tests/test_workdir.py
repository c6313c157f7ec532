import dataclasses
import re
from typing import Any

import pytest

from mfjax.config import RunConfig, Schedule
from mfjax.workdir import check_config, read_config, write_config


def changed(section: str, **values: Any) -> RunConfig:
  config = RunConfig()
  return dataclasses.replace(
    config, **{section: dataclasses.replace(getattr(config, section), **values)}
  )


def test_a_config_is_read_back(tmp_path):
  config = changed("data", mixture=(("code", 0.5), ("prose", 1.0)))
  write_config(tmp_path / "new/workdir", config)
  assert read_config(tmp_path / "new/workdir") == config
  assert [path.name for path in (tmp_path / "new/workdir").iterdir()] == ["config.json"]


def test_a_missing_or_empty_directory_is_free(tmp_path):
  check_config(tmp_path, RunConfig())
  check_config(tmp_path / "missing", RunConfig())
  (tmp_path / "config.json.tmp").touch()  # A crash while it was first written.
  (tmp_path / "logs").mkdir()  # The launcher's.
  check_config(tmp_path, RunConfig())


@pytest.mark.parametrize(
  "config",
  [
    changed("mesh", fsdp=4),
    changed("evaluate", every=7),
    changed("checkpoint", keep_last=9),
    changed("profile", num_steps=3),
    changed("cluster", heartbeat_timeout=99),
    changed("data", prefetch_batches=9),
    changed("data", path="elsewhere"),
    changed("loss", chunk_tokens=16),
    changed("train", log_every=1, tensorboard=False, max_skipped_steps=1),
  ],
  ids=lambda config: RunConfig().differences(config)[0],
)
def test_what_computes_the_same_may_change(tmp_path, config):
  write_config(tmp_path, RunConfig())
  check_config(tmp_path, config)


@pytest.mark.parametrize(
  "config",
  [
    changed("model", d_ff=1024),
    changed("data", sequence_length=8),
    changed("loss", aux_weight=0.5),
    changed("optimizer", learning_rate=1.0),
    changed("train", seed=1),
    changed("train", microbatches=2),
    changed("train", steps=200_000),
  ],
  ids=lambda config: RunConfig().differences(config)[0],
)
def test_what_computes_something_else_is_refused(tmp_path, config, caplog):
  write_config(tmp_path, RunConfig())
  [difference] = RunConfig().differences(config)
  with pytest.raises(ValueError, match="another configuration") as refusal:
    check_config(tmp_path, config)
  assert difference in str(refusal.value)
  check_config(tmp_path, config, allow=True)
  assert difference in caplog.text


def test_a_constant_learning_rate_can_go_on_for_longer(tmp_path):
  config = changed("optimizer", schedule=Schedule.CONSTANT)
  write_config(tmp_path, config)
  longer = dataclasses.replace(config.train, steps=200_000)
  check_config(tmp_path, dataclasses.replace(config, train=longer))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "is not a workdir, it has no config.json but a.txt, b.txt, c.txt, ...: give a new"),
    ('{"architectures": ["GPT2"]}', "config.json is not of mfjax"),
    ('{"mfjax": "0', "config.json is unreadable"),
    ('{"mfjax": "9", "config": {"model": {"d_fff": 1}}}', "mfjax 9: unknown field 'model.d_fff'"),
  ],
)
def test_another_directory_is_refused(tmp_path, content, message):
  for name in "abcd":
    (tmp_path / f"{name}.txt").touch()
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  for allow in (False, True):
    with pytest.raises(ValueError, match=re.escape(message)):
      check_config(tmp_path, RunConfig(), allow=allow)


def test_a_file_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="is a file: give a directory"):
    check_config(tmp_path / "file", RunConfig())
