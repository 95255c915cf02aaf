"""Options and fixtures of the whole suite: strict jax, one `implementation` fixture, shards."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections import defaultdict

# Before jax starts its backends: eight CPU devices to shard over, and a GPU shared with torch.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# XLA 0.12 adds up arrays by a kernel of its own, for which NCCL must give it the peers' addresses. On two
# H200 in a container NCCL could not (`ncclGetPeerDevicePointer failed`), and every psum failed.
OWN_ALL_REDUCE = "--xla_gpu_experimental_use_collective_kernels"
if importlib.metadata.version("jax").startswith("0.12.") and (
    OWN_ALL_REDUCE not in os.environ["XLA_FLAGS"]
):
    os.environ["XLA_FLAGS"] += f" {OWN_ALL_REDUCE}="
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# torch.compile in this process: starting processes for it takes longer than what the tests compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

gc.disable()  # until everything is imported and collected, which leaves little garbage

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import parts  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def why_no_hopper() -> str | None:
    """Why GPU tests cannot run in this process, or None."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device for jax: {str(error).splitlines()[0]}"
    capability = min(float(device.compute_capability) for device in devices)
    return None if capability >= 9.0 else f"needs compute capability 9.0; this GPU has {capability}"


if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # derandomize: the same cases every run; a failure is a failure for everyone.
    for profile, examples in (("default", 60), ("brief", 15)):
        settings.register_profile(
            profile,
            max_examples=examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
    settings.load_profile("default")

_LEFT = pytest.StashKey[int]()  # cases that run in no part of CI
_WAITING = pytest.StashKey[int]()  # cases that run in CI's other turn
_SECONDS = pytest.StashKey[defaultdict[str, list[float]]]()

KERNELS = ("emulator", pytest.param("mosaic_gpu", marks=pytest.mark.gpu))
IMPLEMENTATIONS = ("xla", *KERNELS)


def by_implementation(argument, values, *, xla, ids=str):
    """Parametrises `implementation` and one more argument: 'xla' takes the values `xla` alone.

    It compiles every size anew, in half a second, and has no size at which it becomes another program; the
    kernels have many.
    """
    cases = [pytest.param("xla", x, id=f"xla-{ids(x)}") for x in xla]
    cases += [pytest.param("emulator", x, id=f"emulator-{ids(x)}") for x in values]
    on_gpu = {"marks": pytest.mark.gpu}
    cases += [pytest.param("mosaic_gpu", x, id=f"mosaic_gpu-{ids(x)}", **on_gpu) for x in values]
    names = ("implementation", argument)
    return pytest.mark.parametrize(names, cases, indirect=["implementation"])


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation by name, on the device that it runs on."""
    # The emulator runs on a CPU also where jax's default device is a GPU.
    with jax.default_device(jax.devices("cpu")[0] if request.param == "emulator" else None):
        yield request.param


def pytest_addoption(parser):
    parser.addoption(
        "--expect-jax", metavar="VERSION", help="fail unless this is the jax that runs"
    )
    parser.addoption(
        "--shard", metavar="I/N", help="run only every N-th test, from the I-th (1-based)"
    )
    parser.addoption(
        "--sample",
        metavar="N",
        type=int,
        help="of each test function, run one case in N, at least one",
    )
    parser.addoption(
        "--part",
        choices=parts.NAMES,
        help="one of the three runs of CI, which share out the cases (see tests/parts.py)",
    )
    parser.addoption(
        "--turn",
        type=int,
        choices=range(parts.TURNS),
        help="with --part: of the functions that CI runs in turns only those of this one",
    )
    parser.addoption(
        "--write-costs",
        action="store_true",
        help="after a run of the suite in one process: write tests/costs.txt anew",
    )


def pytest_configure(config):
    wanted = config.option.expect_jax
    if wanted and jax.__version__ != wanted:
        raise pytest.UsageError(f"--expect-jax {wanted}, but jax {jax.__version__} was imported")
    if config.option.part in parts.WITHOUT_TORCH:
        sys.modules.setdefault("torch", None)  # an import fails, as where it is not installed


def pytest_sessionstart(session):
    session.config.stash[_SECONDS] = defaultdict(list)


def pytest_report_header(config):
    return (
        f"jax {jax.__version__}, x64 {jax.config.jax_enable_x64}, GPU: {why_no_hopper() or 'yes'}"
    )


def _keep(config, items, chosen):
    chosen = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _sample(config, items, each):
    """Leaves one case in `each` of every test function, the same ones every time."""
    functions = parts.by_function(items)
    _keep(config, items, [x for _, cases in functions for x in cases[: -(-len(cases) // each)]])


def _part(config, items, part):
    """Leaves the cases of one of CI's three runs."""
    chosen = parts.choose(items, part, config.option.turn)
    config.stash[_LEFT], config.stash[_WAITING] = chosen.left, chosen.waiting
    _keep(config, items, chosen.cases)


def pytest_ignore_collect(collection_path, config):
    part = config.option.part
    file = os.path.relpath(collection_path, config.rootpath)
    file += "/" if collection_path.is_dir() else ""
    return True if part and not parts.reads(part, file) else None


def pytest_collection_modifyitems(config, items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_hopper() if on_gpu else None
    if reason and not config.option.markexpr and len(on_gpu) < len(items):
        # Left out whole, and the header says why: thousands of skips take time and hide the others.
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    elif reason:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.option.sample:
        _sample(config, items, config.option.sample)
    if config.option.part:
        _part(config, items, config.option.part)
    if config.option.shard:
        index, count = map(int, config.option.shard.split("/"))
        if not 1 <= index <= count:
            raise pytest.UsageError(
                f"--shard must be I/N with 1 <= I <= N; got {config.option.shard}"
            )
        _keep(config, items, items[index - 1 :: count])


def pytest_collection_finish(session):
    """What lives until the end is no garbage: without it, each full collection looks at all of it."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Keeps the CPU time of each case, its processes' included, for --write-costs."""
    begun = os.times()
    try:
        return (yield)
    finally:
        seconds = sum(os.times()[:4]) - sum(begun[:4])
        item.config.stash[_SECONDS][parts.function_of(item.nodeid)].append(seconds)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """From a worker process: each has collected all, and all say the same."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_LEFT] = output.get("left", 0)
    node.config.stash[_WAITING] = output.get("waiting", 0)


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash.get(_LEFT, 0):
        terminalreporter.write_line(
            f"{left} cases of these files run in no part of CI, only in `make test-whole`"
        )
    if waiting := config.stash.get(_WAITING, 0):
        terminalreporter.write_line(
            f"{waiting} cases of this run wait for CI's other turn (this is turn {config.option.turn}); "
            "without TURN, `make` runs both"
        )


def pytest_unconfigure(config):
    atexit.register(gc.unfreeze)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A run in which nothing passed is a failure, also where everything was skipped."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    on_worker = hasattr(config, "workerinput")
    if on_worker:
        config.workeroutput["left"] = config.stash.get(_LEFT, 0)
        config.workeroutput["waiting"] = config.stash.get(_WAITING, 0)
    elif config.option.write_costs:
        parts.write_costs(config.stash[_SECONDS])
    if exitstatus == 0 and not on_worker and not config.option.collectonly and reporter:
        if not reporter.stats.get("passed"):
            reporter.write_line("no test passed: this run tested nothing", red=True)
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
