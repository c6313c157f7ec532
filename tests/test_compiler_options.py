"""Presets of compiler options: accepted by the compilers, given to the step, and off when asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from mfjax import compiler_options, sharding, train_step
from mfjax.config import KernelConfig
from tests import tiny
from tests.pallas_kernels import gpu_target
from tests.pallas_kernels.tpu_target import TOPOLOGIES, needs_libtpu


def compile_for(mesh, options):
  replicated = jax.NamedSharding(mesh, jax.P())
  x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=replicated)
  return jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


@needs_libtpu
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_a_tpus_options_are_accepted(target, monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target])
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  compile_for(mesh, compiler_options.options("tpu", True))
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    compile_for(mesh, {"xla_tpu_no_such_option": True})


@gpu_target.needs_cuda_plugin
def test_a_gpus_options_are_accepted():
  compile_for(gpu_target.mesh(), compiler_options.options("gpu", True))
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    compile_for(gpu_target.mesh(), {"xla_gpu_no_such_option": True})


def test_the_step_is_compiled_with_the_preset_unless_it_is_off(monkeypatch):
  monkeypatch.setitem(compiler_options.PRESETS, "cpu", {"xla_cpu_some_option": True})
  config = tiny.run_config()
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  given = []
  monkeypatch.setattr(jax, "jit", lambda function, **options: given.append(options) or function)
  for preset in (True, False):
    run = dataclasses.replace(config, kernels=KernelConfig(compiler_preset=preset))
    train_step.make_train_step(run, mesh)
  assert [options["compiler_options"] for options in given] == [{"xla_cpu_some_option": True}, {}]


def test_options_are_shown_as_flags():
  text = compiler_options.as_text({"xla_a": True, "xla_b": 3})
  assert text == "--xla_a=true --xla_b=3"
  assert compiler_options.options("tpu", False) == {}
