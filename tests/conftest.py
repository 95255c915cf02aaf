"""Options and fixtures of the whole suite: strict jax, one `implementation` fixture, shards."""

import gc
import importlib.util
import os
import re
import zlib

# Before jax starts its backends: eight CPU devices to shard over, and a GPU shared with torch.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

gc.disable()  # until everything is imported and collected, which leaves little garbage

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# CI runs the suite three times: with the newest jax, with the oldest that we support, and with 64-bit jax.
# What may depend on either is shared out by `--part`: of each test function the first run takes two cases in
# four, the others one each. So each case runs once; of a function with fewer cases the first one runs again
# in one of the other two. What depends on neither runs in the first alone, and whole: files about NumPy,
# shell, command line, benchmarks and text, PyTorch's, and the examples that train and generate.
PARTS = {"newest-jax": (0, 1), "oldest-jax": (2,), "x64": (3,)}
ONCE = re.compile(
    r"tests/(bench|bridge|gpu|no_gpu)/|test_(cli|docs|emulator|eplb|files|gpu_test|language_traps|layering|"
    r"make_venv|oracle|package|project_files|sanitize|soak|train_moe|transformers|tun|"
    r"type_hints)[^/]*\.py"
)


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
        choices=PARTS,
        help="one of the three runs of CI, which share out the cases (see PARTS in tests/conftest.py)",
    )


def pytest_configure(config):
    wanted = config.option.expect_jax
    if wanted and jax.__version__ != wanted:
        raise pytest.UsageError(f"--expect-jax {wanted}, but jax {jax.__version__} was imported")


def pytest_report_header(config):
    return (
        f"jax {jax.__version__}, x64 {jax.config.jax_enable_x64}, GPU: {why_no_hopper() or 'yes'}"
    )


def _by_function(items):
    """The cases of each test function in an order that does not follow the order of their parameters."""
    functions = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in functions.values():
        yield sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))


def _keep(config, items, chosen):
    chosen = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _sample(config, items, each):
    """Leaves one case in `each` of every test function, the same ones every time."""
    _keep(
        config, items, [x for cases in _by_function(items) for x in cases[: -(-len(cases) // each)]]
    )


def _part(config, items, part):
    """Leaves the cases of one of the PARTS."""
    chosen = []
    for cases in _by_function(items):
        if part == "x64" and "test_doctests" in cases[0].nodeid:
            continue  # jnp.ones() of an example is float64 there, which grouped products refuse
        if not ONCE.search(cases[0].nodeid):
            mine = [x for i, x in enumerate(cases) if i % 4 in PARTS[part]]
            function = cases[0].nodeid.split("[")[0]
            again = ("oldest-jax", "x64")[zlib.crc32(function.encode()) % 2]
            chosen += mine or (cases[:1] if part == again else [])
        elif part == "newest-jax":
            chosen += cases
        elif part == "oldest-jax" and "tests/bridge/test_align.py" in cases[0].nodeid:
            chosen += cases[: -(-len(cases) // 4)]  # PyTorch through the oldest jax
    _keep(config, items, chosen)


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


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A run in which nothing passed is a failure, also where everything was skipped."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    on_worker = hasattr(config, "workerinput")
    if exitstatus == 0 and not on_worker and not config.option.collectonly and reporter:
        if not reporter.stats.get("passed"):
            reporter.write_line("no test passed: this run proves nothing", red=True)
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
