"""vLLM's own `TritonExperts` on a CPU: its Triton kernel in Triton's interpreter, its compiled ops in Python.

`python -m tests.bridge.vllm_layer_interpreted` prints a line per form of layer, `form error`. It finds what
benchmarks/vllm_experts.py fails to stand in for, without a GPU. float16: the interpreter computes bfloat16
wrongly.
"""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import vllm_experts
from tests.moe_layer import oracle

PEERS = Path(__file__).parents[2] / ".peers"
FORMS = ("pairs", "blocks", "map", "weights on input")


class Case:
    """Operands of a layer of one form, on the CPU."""

    def __init__(self, form: str, dtype: torch.dtype):
        tokens, top_k, experts, hidden, ffn = {"pairs": (2, 2, 32, 256, 128)}.get(
            form, (40, 1 if form == "weights on input" else 2, 8, 256, 128)
        )
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)

        self.x, self.w13 = normal(tokens, hidden), normal(experts, 2 * ffn, hidden) * hidden**-0.5
        self.w2, slots = normal(experts, hidden, ffn) * ffn**-0.5, experts
        self.expert_map = None
        if form == "map":
            slots = 2 * experts
            local = np.full(slots, -1, np.int32)
            local[rng.permutation(slots)[:experts]] = np.arange(experts)
            self.expert_map = torch.from_numpy(local)
        ids = np.argsort(rng.random((tokens, slots)), 1)[:, :top_k].astype(np.int32)
        self.ids = torch.from_numpy(ids)
        self.weights = torch.from_numpy(rng.uniform(0.2, 1, ids.shape).astype(np.float32))
        self.on_input = form == "weights on input"
        self.sizes = (tokens, top_k, experts, hidden, ffn)

    def operands(self, device: str) -> list[torch.Tensor]:
        given = (self.x, self.w13, self.w2, self.weights, self.ids)
        return [tensor.to(device) for tensor in given]

    def error(self, out: torch.Tensor) -> float:
        """Relative, beside the oracle in float64."""
        given = (self.x, self.w13, self.w2, self.weights)
        want, _ = oracle.layer(
            *(t.float().numpy() for t in given),
            self.ids.numpy(),
            transpose_rhs=True,
            weights_on_input=self.on_input,
            expert_map=None if self.expert_map is None else self.expert_map.tolist(),
        )
        found = out.double().cpu().numpy()
        return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def _align(
    ids: Any, experts: int, block: int, rows: Any, owners: Any, count: Any, local: Any = None
) -> None:
    """vLLM's `moe_align_block_size`: pairs of experts that are not local are left out."""
    flat, at = ids.flatten().tolist(), 0
    rows.fill_(len(flat))
    owners.fill_(-1)
    for expert in range(experts):
        owner = expert if local is None else int(local[expert])
        pairs = [pair for pair, one in enumerate(flat) if one == expert and owner >= 0]
        rows[at : at + len(pairs)] = torch.tensor(pairs, dtype=torch.int32)
        end = at + -(-len(pairs) // block) * block
        owners[at // block : end // block] = owner
        at = end
    count.fill_(at)


def _sum(x: Any, out: Any, ids: Any = None, local: Any = None) -> None:
    if local is not None:
        x = x.masked_fill((local[ids.long()] < 0)[..., None], 0)
    out.copy_(x.float().sum(1))


def _silu(out: Any, x: Any) -> None:
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _define_ops() -> list[torch.library.Library]:
    schemas = {
        "_moe_C": {
            "moe_align_block_size(Tensor a, int b, int c, Tensor(d!) d, Tensor(e!) e, Tensor(f!) f, "
            "Tensor? g=None, Tensor? h=None) -> ()": _align,
            "moe_sum(Tensor a, Tensor(b!) b, Tensor? c=None, Tensor? d=None) -> ()": _sum,
        },
        "_C": {"silu_and_mul(Tensor(a!) a, Tensor b) -> ()": _silu},
    }
    made = []
    for name, ops in schemas.items():
        library = torch.library.Library(name, "FRAGMENT")
        for schema, function in ops.items():
            library.define(schema)
            library.impl(schema.partition("(")[0], function, "CPU")
        made.append(library)
    return made


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, below
    kept = _define_ops()
    with (
        mock.patch.object(vllm_experts, "load_ops", lambda peers: kept),
        mock.patch("torch.cuda.get_device_name", lambda: "NVIDIA H200"),
        mock.patch("torch.cuda.get_device_capability", lambda: (9, 0)),
        vllm_experts.imported(PEERS) as module,
    ):
        for form in FORMS:
            case = Case(form, torch.float16)
            layer = vllm_experts.Layer(
                *(module, str(PEERS), *case.sizes),
                dtype=torch.float16,
                expert_map=case.expert_map,
                device="cpu",
            )
            out = torch.full_like(case.x, float("nan"))
            layer.run(*case.operands("cpu"), out, case.on_input)
            print(form, case.error(out), sep=": ", flush=True)


if __name__ == "__main__":
    main()
