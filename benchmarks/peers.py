"""Who is measured: ours, XLA composites, torch's own sort, vLLM's and SGLang's compiled ops.

Each provider knows its version, or why it is absent here. The only file that sees a peer's package.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case

POISON = -7777  # what outputs hold before a call: no valid index, no sentinel, no -1


@dataclass(frozen=True)
class Provider:
    """Something that aligns.

    Attributes:
        name: as in tables and JSONL.
        kind: "jax" (timed inside one jit) or "torch" (timed in one CUDA graph).
        what: one line for tables.
        version: the release, or where it came from.
        absent: why it cannot run here, "" when it can.
        make: for "jax", `case -> (ids -> AlignedBlocks or dict)`; for "torch",
            `(case, list of ids) -> TorchCalls`.
        max_experts: it is not asked for more.
        stable: whether it promises ascending order within an expert.
        expert_tail: whether it writes `expert_ids` past the last used block.
        row_tail: whether it writes `sorted_token_ids` past the rows in use.
        max_pairs: it is not asked for more.
        options: whether it takes an expert map, a bound on the pairs, and gives the inverse.
        only: the names of the cases that it is for; empty for all.
        calls: calls per measured program; None for the run's own number.
    """

    name: str
    kind: str
    what: str
    version: str = ""
    absent: str = ""
    make: Callable[..., Any] | None = None
    max_experts: int | None = None
    stable: bool = True
    expert_tail: bool = True
    row_tail: bool = True
    max_pairs: int | None = None
    options: bool = False
    only: tuple[str, ...] = ()
    calls: int | None = None

    def refuses(self, case: Case) -> str:
        """Why it cannot take this case, "" when it can."""
        if self.max_experts is not None and case.num_experts > self.max_experts:
            return f"takes at most {self.max_experts} experts"
        if self.max_pairs is not None and case.num_pairs > self.max_pairs:
            return f"takes at most {self.max_pairs} pairs"
        if case.with_options and not self.options:
            return "takes no options"
        if self.only and case.name not in self.only:
            return f"is measured at {', '.join(self.only)} only"
        return ""

    @property
    def promises(self) -> dict[str, bool]:
        """What `cases.mismatch` holds it to."""
        return {name: getattr(self, name) for name in ("stable", "expert_tail", "row_tail")}


@dataclass(frozen=True)
class TorchCalls:
    """Prepared calls: `calls[i]()` reads input i and writes the tensors of `outputs[i]`, or replaces them."""

    calls: list[Callable[[], None]]
    outputs: list[dict[str, Any]]

    def poison(self) -> None:
        for tensors in self.outputs:
            for tensor in tensors.values():
                tensor.fill_(POISON)

    def results(self) -> list[dict[str, np.ndarray]]:
        return [{k: t.cpu().numpy() for k, t in tensors.items()} for tensors in self.outputs]


# -- jax ------------------------------------------------------------------------------------------


def _ours(case: Case, *, implementation: str) -> Callable:
    from moe_align_jax import moe_align_block_size

    options: dict[str, Any] = {}
    if case.with_options:
        options["expert_map"], options["ignore_invalid_experts"] = case.expert_map, True
        options["num_valid_pairs"], options["return_inverse"] = np.int32(case.num_pairs), True
    return functools.partial(
        moe_align_block_size,
        block_size=case.block_size,
        num_experts=case.num_experts,
        implementation=implementation,
        **options,
    )


def xla_argsort(case: Case) -> Callable:
    """What a JAX model writes by hand: argsort, bincount, searchsorted."""
    import jax.numpy as jnp

    n, num_experts, block = case.num_pairs, case.num_experts, case.block_size

    def align(topk_ids):
        flat = topk_ids.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        counts = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
        padded = (counts + block - 1) // block * block
        ends = jnp.cumsum(padded, dtype=jnp.int32)
        shift = ends - padded - (jnp.cumsum(counts, dtype=jnp.int32) - counts)
        rows = jnp.arange(n, dtype=jnp.int32) + shift[flat[order]]
        first_row = jnp.arange(case.num_blocks, dtype=jnp.int32) * block
        label = jnp.searchsorted(ends, first_row, side="right").astype(jnp.int32)
        return {
            "sorted_token_ids": jnp.full(case.capacity, n, jnp.int32).at[rows].set(order),
            "expert_ids": jnp.where(label < num_experts, label, -1),
            "num_tokens_post_padded": ends[-1:],
            "tokens_per_expert": counts,
        }

    return align


def jax_providers() -> list[Provider]:
    import jax

    from moe_align_jax import __version__, select_implementation

    version = f"jax {jax.__version__}"
    size: dict[str, Any] = {"topk_ids_or_shape": (8,), "block_size": 16, "num_experts": 8}
    best = select_implementation(**size)
    found = []
    for name, what, calls in (
        ("mosaic_gpu", "ours: Pallas kernels under jit", None),
        ("xla", "ours: plain jnp under jit", 5),
    ):
        absent = ""
        try:
            select_implementation(**size, implementation=name)
        except NotImplementedError as error:
            absent = best.reasons.get(name, str(error))
        make = functools.partial(_ours, implementation=name)
        ours = f"{__version__}, {version}"
        found.append(Provider(name, "jax", what, ours, absent, make, calls=calls, options=True))
    composite = "argsort, bincount, searchsorted under jit"
    found.append(Provider("xla_argsort", "jax", composite, version, "", xla_argsort, calls=5))
    return found


# -- torch ----------------------------------------------------------------------------------------


def torch_providers(
    vllm_op: str | None, sglang_op: str | None, sglang_small: str | None = None
) -> list[Provider]:
    """torch's own sort and the compiled peers; each absent with a reason where it cannot run."""
    what = "ours: the same kernels, launched by PyTorch"
    direct = Provider("torch_bridge", "torch", what, make=direct_calls, options=True)
    empty = Provider(
        "empty", "torch", "a kernel that does nothing", make=_empty, only=("8x256x16",)
    )
    sort = Provider("torch_sort", "torch", "torch.sort and a scatter", make=torch_sort)
    vllm = Provider("vllm", "torch", "vLLM's CUDA op", make=_vllm, max_experts=992, stable=False)
    sglang = Provider(
        "sglang",
        "torch",
        "SGLang's CUDA op",
        make=_sglang,
        max_experts=1023,
        stable=False,
        expert_tail=False,
    )
    small = [
        Provider(
            name,
            "torch",
            f"SGLang's single-launch Triton kernel{what}",
            make=functools.partial(_sglang_small, pdl=pdl),
            max_pairs=64,
            expert_tail=False,
            row_tail=False,
        )
        for name, what, pdl in (
            ("sglang_small", "", False),
            ("sglang_small_pdl", ", launched with PDL", True),
        )
    ]
    try:
        import torch

        reason = f"torch {torch.__version__} sees no CUDA device"
        here = torch.cuda.is_available()
    except ImportError:
        reason, here = "PyTorch is not installed", False
    if not here:
        return [_with(p, absent=reason) for p in (direct, vllm, sglang, *small, sort, empty)]
    major = torch.cuda.get_device_capability()[0]
    pattern = f"sm{major}0/common_ops*.so"
    found = [
        _compiled(torch, vllm, vllm_op, "vllm", "vllm", "_moe_C*.so", "_moe_C", "--vllm-op"),
        _compiled(
            torch,
            sglang,
            sglang_op,
            "sglang-kernel",
            "sgl_kernel",
            pattern,
            "sgl_kernel",
            "--sglang-op",
        ),
    ]
    import torch_bridge

    ids = torch.zeros(8, 1, dtype=torch.int32, device="cuda")
    plan = torch_bridge.explain(ids, 8, 16)
    ours = f"torch {torch.__version__}, path {plan.path!r}"
    direct = _with(direct, version=ours, absent=plan.reasons.get("direct", ""))
    small = [_small(provider, sglang_small) for provider in small]
    version = f"torch {torch.__version__}"
    return [direct, *found, *small, _with(sort, version=version), _with(empty, version=version)]


def _with(provider: Provider, **changes: Any) -> Provider:
    return Provider(**{**provider.__dict__, **changes})


def _compiled(
    torch: Any,
    provider: Provider,
    path: str | None,
    distribution: str,
    package: str,
    pattern: str,
    namespace: str,
    option: str,
) -> Provider:
    """Loads a peer's op library: the given path, or the one of an installed package."""
    if path is None:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        libraries = sorted(lib for place in places for lib in Path(place).glob(pattern))
        if not libraries:
            reason = (
                f"{distribution} is not installed and {option} names no library "
                f"(`python -m benchmarks.fetch` gets one)"
            )
            return _with(provider, absent=reason)
        version = f"{distribution} {importlib.metadata.version(distribution)}"
    else:
        libraries, version = [Path(path)], _version_of(Path(path))
    errors = []
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            errors.append(f"{library.name}: {str(error).splitlines()[0]}")
        if hasattr(getattr(torch.ops, namespace), "moe_align_block_size"):
            return _with(provider, version=version)
    problem = "; ".join(errors) or "no moe_align_block_size among its ops"
    return _with(provider, absent=f"its library does not serve here: {problem}")


def _small(provider: Provider, path: str | None) -> Provider:
    """SGLang's Triton kernel: from the file that benchmarks.fetch took out of its wheel."""
    if importlib.util.find_spec("triton") is None:
        return _with(provider, absent="Triton is not installed")
    if path is None or not Path(path).is_file():
        reason = f"--sglang-small names no file ({path}; `python -m benchmarks.fetch` gets one)"
        return _with(provider, absent=reason)
    make = functools.partial(provider.make, path=path)  # type: ignore[arg-type]
    return _with(provider, version=_version_of(Path(path)), make=make)


@functools.cache
def _module_at(path: str) -> Any:
    """A Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _version_of(library: Path) -> str:
    """The release that benchmarks.fetch noted beside a library, otherwise its hash."""
    note = library.with_name("versions.json")
    if note.is_file():
        version = json.loads(note.read_text()).get(library.name)
        if version:
            return version
    if not library.is_file():
        return f"{library} (missing)"
    return f"{library.name} sha256 {hashlib.sha256(library.read_bytes()).hexdigest()[:12]}"


def _buffers(case: Case, capacity: int, count: int) -> list[dict[str, Any]]:
    import torch

    blocks = -(-capacity // case.block_size)
    sizes = {"sorted_token_ids": capacity, "expert_ids": blocks, "num_tokens_post_padded": 1}
    return [
        {k: torch.full((s,), POISON, dtype=torch.int32, device="cuda") for k, s in sizes.items()}
        for _ in range(count)
    ]


def _on_gpu(ids: list[np.ndarray]) -> list[Any]:
    import torch

    return [torch.from_numpy(i).cuda() if isinstance(i, np.ndarray) else i for i in ids]


def direct_calls(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    import torch_bridge

    if case.with_options:
        return _direct_with_options(case, ids)
    outputs = _buffers(case, case.capacity, len(ids))

    def align(topk_ids, *out):
        torch_bridge.moe_align_block_size(
            topk_ids, case.num_experts, case.block_size, out=out, path="auto"
        )

    calls = [
        functools.partial(align, i, *o.values()) for i, o in zip(_on_gpu(ids), outputs, strict=True)
    ]
    return TorchCalls(calls, outputs)


def _direct_with_options(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    """Each call takes its results from torch's allocator: inside a capture, from the graph's pool."""
    import torch

    import torch_bridge

    expert_map, limit = _on_gpu([case.expert_map, np.array([case.num_pairs], np.int32)])
    outputs: list[dict[str, torch.Tensor]] = [{} for _ in ids]

    def align(topk_ids: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
        aligned = torch_bridge.align_blocks(
            topk_ids,
            num_experts=case.num_experts,
            block_size=case.block_size,
            expert_map=expert_map,
            ignore_invalid_experts=True,
            num_valid_pairs=limit,
            return_inverse=True,
        )
        results |= aligned._asdict()

    given = zip(_on_gpu(ids), outputs, strict=True)
    return TorchCalls([functools.partial(align, i, o) for i, o in given], outputs)


def prepare_direct(cases: Sequence[Case]) -> str:
    """Compiles all programs that `torch_bridge` needs for these cases, many at once.

    Returns:
        Why one of them could not be made (its case will say so too), else "".
    """
    import torch

    from torch_bridge._direct import problems, store

    device = torch.device("cuda", torch.cuda.current_device())
    wanted = {
        problems.bucket_problem(
            case.num_pairs,
            case.num_experts,
            case.block_size,
            expert_map="filter" * case.with_options,
            has_num_valid_pairs=case.with_options,
            return_counts=case.with_options,
            return_inverse=case.with_options,
            tuning=store.here.machine.tuning(device),
        )
        for case in cases
    }
    try:
        store.here.prepare(device.index, sorted(wanted), again=True)
    except store.Unavailable as reason:
        return str(reason)
    return ""


def _empty(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    """The least that a kernel in a CUDA graph takes: torch's spinning kernel, told to spin for no cycle."""
    import torch

    del case
    return TorchCalls([functools.partial(torch.cuda._sleep, 0)] * len(ids), [])


def _vllm(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    import torch

    op = torch.ops._moe_C.moe_align_block_size
    outputs = _buffers(case, case.capacity, len(ids))
    # The last two are expert_map and, from vLLM 0.33 on, scatter_idx: neither is used.
    arguments = len(op.default._schema.arguments)
    calls = [
        functools.partial(
            op, i, case.num_experts, case.block_size, *o.values(), *[None] * (arguments - 6)
        )
        for i, o in zip(_on_gpu(ids), outputs, strict=True)
    ]
    return TorchCalls(calls, outputs)


def _sglang(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    import torch

    op = torch.ops.sgl_kernel.moe_align_block_size
    n, buckets, block = case.num_pairs, case.num_experts + 1, case.block_size
    capacity = n * block if n < buckets else n + buckets * (block - 1)
    # Its sentinel fill stores four words at a time, as its Python layer's sizes assume.
    outputs = _buffers(case, -(-capacity // 4) * 4, len(ids))
    calls = []
    for i, o in zip(_on_gpu(ids), outputs, strict=True):
        scratch = torch.zeros(buckets + 1, dtype=torch.int32, device="cuda")
        calls.append(functools.partial(op, i, buckets, block, *o.values(), scratch, True))
    return TorchCalls(calls, outputs)


def _sglang_small(case: Case, ids: list[np.ndarray], *, path: str, pdl: bool) -> TorchCalls:
    module = _module_at(path)
    n, buckets, block = case.num_pairs, case.num_experts + 1, case.block_size
    capacity = n * block if n < buckets else n + buckets * (block - 1)
    outputs = _buffers(case, max(capacity, case.capacity), len(ids))

    def align(*arguments):
        module.is_arch_support_pdl = lambda: pdl  # a question that the file asks of SGLang
        module.moe_align_small_numel(*arguments)

    calls = [
        functools.partial(align, i, buckets, block, *o.values())
        for i, o in zip(_on_gpu(ids), outputs, strict=True)
    ]
    return TorchCalls(calls, outputs)


def torch_sort(case: Case, ids: list[np.ndarray]) -> TorchCalls:
    """One stable sort, counts by binary search, one scatter. Nothing synchronises."""
    import torch

    n, num_experts, block = case.num_pairs, case.num_experts, case.block_size
    outputs = _buffers(case, case.capacity, len(ids))
    int32 = {"dtype": torch.int32, "device": "cuda"}
    experts = torch.arange(num_experts, **int32)
    position = torch.arange(n, **int32)
    first_row = torch.arange(case.num_blocks, **int32) * block
    zero = torch.zeros(1, **int32)

    def align(topk_ids, sorted_token_ids, expert_ids, num_tokens_post_padded):
        expert, pair = torch.sort(topk_ids.view(-1), stable=True)
        pair_ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
        counts = torch.diff(pair_ends, prepend=zero)
        padded = (counts + (block - 1)) // block * block
        ends = torch.cumsum(padded, 0, dtype=torch.int32)
        shift = (ends - padded) - (pair_ends - counts)
        rows = position + shift[expert]
        sorted_token_ids.fill_(n)
        sorted_token_ids.scatter_(0, rows.long(), pair.to(torch.int32))
        label = torch.searchsorted(ends, first_row, right=True, out_int32=True)
        expert_ids.copy_(torch.where(label < num_experts, label, -1))
        num_tokens_post_padded.copy_(ends[-1:])

    calls = [
        functools.partial(align, i, *o.values()) for i, o in zip(_on_gpu(ids), outputs, strict=True)
    ]
    return TorchCalls(calls, outputs)
