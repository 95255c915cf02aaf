"""rebalance_experts against DeepSeek's published example and a slow oracle; plans of moves."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_align_jax as maj
from moe_align_jax._eplb import greedy
from moe_align_jax.eplb import MoveKind

README = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]
SIZES = {"num_groups": 4, "num_nodes": 2, "num_gpus": 8}
F32 = np.float32


# -- the oracle: one layer, plain loops over single float32 numbers ---------------------------------------


def oracle_pack(weight, num_packs):
    capacity = len(weight) // num_packs
    if capacity == 1:
        return [(i, 0) for i in range(len(weight))]
    packs = [[] for _ in range(num_packs)]
    load = [F32(0)] * num_packs
    place = {}
    for item in sorted(range(len(weight)), key=lambda i: (-weight[i], i)):
        room = [p for p in range(num_packs) if len(packs[p]) < capacity]
        pack = min(room, key=lambda p: (load[p], p))
        place[item] = pack, len(packs[pack])
        packs[pack].append(item)
        load[pack] = F32(load[pack] + weight[item])
    return [place[i] for i in range(len(weight))]


def oracle_replicate(weight, num_replicas):
    count = [1] * len(weight)
    replicas = [(i, 0) for i in range(len(weight))]
    while len(replicas) < num_replicas:
        hot = max(range(len(weight)), key=lambda i: (F32(weight[i] / F32(count[i])), -i))
        replicas.append((hot, count[hot]))
        count[hot] += 1
    return replicas, count


def oracle_replicate_for_steps(steps, num_replicas):
    """Tries every expert for every further replica: the sum over steps of the resulting maximum."""
    num_experts = len(steps[0])
    count = [1] * num_experts
    replicas = [(i, 0) for i in range(num_experts)]
    total = [sum(float(step[i]) for step in steps) for i in range(num_experts)]
    while len(replicas) < num_replicas:
        gains = []
        for x in range(num_experts):
            gain = 0.0
            for step in steps:
                now = [F32(w / F32(c)) for w, c in zip(step, count, strict=True)]
                then = list(now)
                then[x] = F32(step[x] / F32(count[x] + 1))
                gain += float(F32(max(now) - max(then)))
            gains.append(gain)
        chosen = max(range(num_experts), key=lambda x: (gains[x], total[x] / count[x], -x))
        replicas.append((chosen, count[chosen]))
        count[chosen] += 1
    return replicas, count


def oracle_snake(weight, num_packs):
    place = {}
    if num_packs == len(weight):
        return oracle_pack(weight, num_packs)
    for position, item in enumerate(sorted(range(len(weight)), key=lambda i: (-weight[i], i))):
        lap, step = divmod(position, num_packs)
        place[item] = (step if lap % 2 == 0 else num_packs - 1 - step), lap
    return [place[i] for i in range(len(weight))]


def oracle(steps, num_replicas, num_groups, num_nodes, num_gpus, windowed=False):
    """(physical_to_logical_map, {expert: slots in order}) of one layer."""
    weight = [F32(sum(int(step[i]) for step in steps)) for i in range(len(steps[0]))]
    size = len(weight) // num_groups
    groups = []
    for g in range(num_groups):
        load = F32(0)
        for w in weight[g * size : (g + 1) * size]:
            load = F32(load + w)
        groups.append(load)
    order = {}
    for g, (node, place) in enumerate(oracle_pack(groups, num_nodes)):
        order[node * (num_groups // num_nodes) + place] = g
    experts = [order[k] * size + i for k in range(num_groups) for i in range(size)]
    on_node, per_node = num_replicas // num_nodes, len(weight) // num_nodes
    physical, slots = [None] * num_replicas, {}
    for node in range(num_nodes):
        mine = experts[node * per_node : (node + 1) * per_node]
        local = [weight[e] for e in mine]
        if windowed:
            window = [[F32(step[e]) for e in mine] for step in steps]
            replicas, count = oracle_replicate_for_steps(window, on_node)
        else:
            replicas, count = oracle_replicate(local, on_node)
        share = [F32(local[i] / F32(count[i])) for i, _ in replicas]
        packing = (oracle_snake if windowed else oracle_pack)(share, num_gpus // num_nodes)
        for (i, rank), (gpu, slot) in zip(replicas, packing, strict=True):
            where = node * on_node + gpu * (num_replicas // num_gpus) + slot
            physical[where] = mine[i]
            slots.setdefault(mine[i], {})[rank] = where
    return physical, {e: [ranks[r] for r in sorted(ranks)] for e, ranks in slots.items()}


def assert_is_oracles(placement, history, *sizes, windowed=False):
    widest = 0
    for layer in range(history.shape[1]):
        physical, slots = oracle(history[:, layer], *sizes, windowed=windowed)
        assert placement.physical_to_logical_map[layer].tolist() == physical
        for expert, want in slots.items():
            row = placement.logical_to_physical_map[layer, expert].tolist()
            assert row == want + [-1] * (len(row) - len(want))
            assert placement.expert_count[layer, expert] == len(want)
            widest = max(widest, len(want))
    assert placement.logical_to_physical_map.shape[2] == widest
    assert all(array.dtype == np.int32 for array in placement)


def zipf(rng, *shape, exponent=1.2, tokens=5000):
    """Counts with a few hot experts, other ones in every layer; many ties among the cold."""
    share = 1 / np.arange(1, shape[-1] + 1) ** exponent
    share = rng.permuted(np.broadcast_to(share / share.sum(), shape), axis=-1)
    return rng.poisson(share * tokens)


# -- golden vectors ---------------------------------------------------------------------------------------


def test_readme_example_hierarchical():
    placement = maj.rebalance_experts(README, 16, **SIZES)
    assert placement.physical_to_logical_map.tolist() == HIERARCHICAL
    assert placement.expert_count.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    assert placement.logical_to_physical_map[0].tolist() == [
        *([12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2]),
        *([1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]),
    ]
    assert_is_oracles(placement, np.array([README]), 16, 4, 2, 8)


@pytest.mark.parametrize("how", ["by name", "groups do not divide over nodes"])
def test_readme_example_global(how):
    options = {"algorithm": "deepseek"} if how == "by name" else {"num_nodes": 3}
    placement = maj.rebalance_experts(README, 16, **SIZES | options)
    assert placement.physical_to_logical_map.tolist() == GLOBAL


def test_readme_example_balancedness():
    def of(slots):
        return maj.balancedness(maj.expected_physical_count(README, slots), 8).tolist()

    trivial = [[p % 12 for p in range(16)]] * 2
    assert of(HIERARCHICAL) == pytest.approx([0.8277, 0.8050], abs=5e-5)
    assert of(GLOBAL) == pytest.approx([0.9323, 0.8401], abs=5e-5)
    assert of(trivial) == pytest.approx([0.4800, 0.4201], abs=5e-5)


def test_replicas_of_one_expert_may_share_a_gpu():
    """Not guaranteed by the algorithm, and pinned here so that nobody relies on the contrary."""
    placement = maj.rebalance_experts([[1000, *[1] * 7]], 12, num_groups=2, num_nodes=2, num_gpus=4)
    assert placement.physical_to_logical_map[0, :3].tolist().count(0) == 2


def test_zero_load_replicates_the_first_expert_of_each_node():
    placement = maj.rebalance_experts(np.zeros((1, 8)), 12, num_groups=2, num_nodes=2, num_gpus=4)
    assert placement.expert_count.tolist() == [[3, 1, 1, 1, 3, 1, 1, 1]]


def test_vllm_sizes():
    """The size lists of vLLM's own tests."""
    rng = np.random.default_rng(7)
    for experts, replicas, groups, nodes, gpus in (
        *((4, 4, 1, 1, 1), (8, 12, 4, 2, 4), (6, 8, 3, 2, 4), (8, 10, 4, 1, 2)),
        *((16, 24, 8, 4, 8), (6, 10, 3, 1, 2), (8, 8, 2, 2, 4)),
    ):
        history = zipf(rng, 1, 3, experts, tokens=200)
        placement = maj.rebalance_experts(history[0], replicas, groups, nodes, gpus)
        sizes = (groups, nodes) if groups % nodes == 0 else (1, 1)
        assert_is_oracles(placement, history, replicas, *sizes, gpus)


# -- the oracle on random loads ---------------------------------------------------------------------------


@st.composite
def problems(draw, max_steps=1):
    nodes, gpus, per_gpu = (draw(st.integers(1, n)) for n in (3, 3, 3))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    gpus, groups = gpus * nodes, groups * nodes
    per_gpu = max(per_gpu, math.ceil(groups * size / gpus))
    shape = (draw(st.integers(1, max_steps)), draw(st.integers(1, 3)), groups * size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    history = zipf(rng, *shape, exponent=draw(st.sampled_from([0.0, 0.8, 1.5])), tokens=30)
    return history, (gpus * per_gpu, groups, nodes, gpus)


@given(problems())
def test_placement_is_the_oracles(problem):
    history, sizes = problem
    placement = maj.rebalance_experts(history[0], *sizes)
    assert_is_oracles(placement, history, *sizes)
    replicas, _, _, gpus = sizes
    everywhere = maj.rebalance_experts(history[0], *sizes, algorithm="deepseek")
    assert_is_oracles(everywhere, history, replicas, 1, 1, gpus)


@given(problems(max_steps=4))
def test_windowed_placement_is_the_oracles(problem):
    history, sizes = problem
    placement = maj.rebalance_experts(history, *sizes, algorithm="deepseek_vec_hierarchical")
    assert_is_oracles(placement, history, *sizes, windowed=True)
    replicas, _, _, gpus = sizes
    placement = maj.rebalance_experts(history, *sizes, algorithm="deepseek_vec")
    assert_is_oracles(placement, history, replicas, 1, 1, gpus, windowed=True)


def test_large_placement_is_the_oracles():
    history = zipf(np.random.default_rng(0), 1, 3, 256, tokens=200_000)
    for sizes in ((288, 8, 4, 32), (288, 1, 1, 32), (256, 8, 8, 8)):
        assert_is_oracles(maj.rebalance_experts(history[0], *sizes), history, *sizes)


def test_steps_are_summed_exactly_before_they_are_rounded():
    """2**24 + 1 + 1 is no sum that float32 can make one by one."""
    steps = np.array([[[2**24, 2**24 + 2]], [[1, 0]], [[1, 0]], [[2, 0]]])
    placement = maj.rebalance_experts(steps, 4, 1, 1, 4)
    assert placement.physical_to_logical_map.tolist() == [[0, 1, 0, 1]]


# -- properties -------------------------------------------------------------------------------------------


@given(problems(max_steps=3), st.sampled_from(["auto", "deepseek", "deepseek_vec"]))
def test_placement_properties(problem, algorithm):
    history, sizes = problem
    replicas, groups, nodes, _ = sizes
    placement = maj.rebalance_experts(history, *sizes, algorithm=algorithm)
    _, layers, experts = history.shape
    assert placement.expert_count.min() >= 1
    assert (placement.expert_count.sum(1) == replicas).all()
    for layer in range(layers):
        slots = placement.physical_to_logical_map[layer]
        assert np.array_equal(np.bincount(slots, minlength=experts), placement.expert_count[layer])
        for expert in range(experts):
            row = placement.logical_to_physical_map[layer, expert]
            count = placement.expert_count[layer, expert]
            assert (row[count:] == -1).all()
            assert sorted(row[:count]) == np.flatnonzero(slots == expert).tolist()
        if algorithm == "auto":
            node_of_slot = np.arange(replicas) // (replicas // nodes)
            for group in range(groups):
                size = experts // groups
                assert len(set(node_of_slot[slots // size == group])) == 1
    if replicas == experts:
        assert (placement.expert_count == 1).all()
    again = maj.rebalance_experts(history, *sizes, algorithm=algorithm)
    scaled = maj.rebalance_experts(history * 4.0, *sizes, algorithm=algorithm)
    for a, b, c in zip(placement, again, scaled, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5), st.integers(0, 4))
def test_replicas_are_counted_out_optimally(weight, extra):
    """No other counts have a lighter heaviest replica: all of them are tried."""
    _, _, count = greedy.replicate(np.array([weight], F32), len(weight) + extra)

    def heaviest(counts):
        return max(w / c for w, c in zip(weight, counts, strict=True))

    def all_counts(n, left):
        if n == 1:
            yield (left + 1,)
            return
        for mine in range(left + 1):
            yield from ((mine + 1, *rest) for rest in all_counts(n - 1, left - mine))

    best = min(map(heaviest, all_counts(len(weight), extra)))
    assert heaviest(count[0].tolist()) == pytest.approx(best)
    assert (
        count[0].argmax() == np.argmax(weight)
        or extra == 0
        or count[0].max() == count[0, np.argmax(weight)]
    )


def test_equal_loads_get_counts_that_differ_by_one_at_most():
    placement = maj.rebalance_experts(np.full((2, 12), 7), 32, 2, 2, 4)
    assert {*placement.expert_count.ravel().tolist()} == {2, 3}


def test_one_step_window_replicates_as_the_greedy_does():
    load = zipf(np.random.default_rng(3), 20, 16, tokens=100).astype(F32)
    for a, b in zip(
        greedy.replicate(load, 24), greedy.replicate_for_steps(load[None], 24), strict=True
    ):
        assert np.array_equal(a, b)


def test_window_sees_a_peak_that_the_sum_hides():
    """Expert 0 is a little above the rest always, expert 1 far above them in one step of four."""
    history = np.full((4, 1, 7), 45)
    history[:, :, 0], history[:, :, 1] = 50, 0
    history[2, :, 1] = 120
    summed = maj.rebalance_experts(history, 8, 1, 1, 8, algorithm="deepseek")
    window = maj.rebalance_experts(history, 8, 1, 1, 8, algorithm="deepseek_vec")
    assert summed.expert_count.tolist() == [[2, 1, 1, 1, 1, 1, 1]]
    assert window.expert_count.tolist() == [[1, 2, 1, 1, 1, 1, 1]]


def test_balance_is_better_than_trivial_in_the_mean():
    load = zipf(np.random.default_rng(0), 58, 256, tokens=1_000_000)
    slots = maj.rebalance_experts(load, 288, 8, 4, 32, algorithm="deepseek").physical_to_logical_map
    after = maj.balancedness(maj.expected_physical_count(load, slots), 32).mean()
    trivial = np.broadcast_to(np.arange(288) % 256, (58, 288))
    before = maj.balancedness(maj.expected_physical_count(load, trivial), 32).mean()
    assert after > 0.9 and after > 3 * before


def test_balancedness_formula():
    assert maj.balancedness(np.zeros((3, 8)), 4).tolist() == [1, 1, 1]
    # vLLM's example: average 25 and maximum 100 in each layer.
    got = maj.balancedness([[100, 0, 0, 0], [100, 0, 0, 0]], 4)
    assert got.dtype == np.float32 and got.tolist() == pytest.approx([0.25, 0.25])


# -- placements that keep experts where they are ----------------------------------------------------------


def received(old, new, gpus):
    """Experts that reach a GPU which did not hold them."""
    old, new = (np.asarray(x).reshape(len(x), gpus, -1) for x in (old, new))
    pairs = ((o, n) for a, b in zip(old, new, strict=True) for o, n in zip(a, b, strict=True))
    return sum(len({*n.tolist()} - {*o.tolist()}) for o, n in pairs)


@given(problems(), st.sampled_from(["auto", "deepseek"]), st.integers(0, 99))
def test_kept_placement_is_the_same_up_to_names(problem, algorithm, seed):
    history, sizes = problem
    gpus = sizes[3]
    rng = np.random.default_rng(seed)
    other = rng.poisson(history[0] * rng.uniform(0.5, 1.5, history[0].shape))
    old = maj.rebalance_experts(history[0], *sizes, algorithm=algorithm).physical_to_logical_map
    new = maj.rebalance_experts(other, *sizes, algorithm=algorithm)
    kept = maj.rebalance_experts(other, *sizes, algorithm=algorithm, previous=old)

    assert np.array_equal(kept.expert_count, new.expert_count)
    for layer in range(len(old)):
        packs = [
            sorted(map(sorted, p.physical_to_logical_map[layer].reshape(gpus, -1).tolist()))
            for p in (new, kept)
        ]
        assert packs[0] == packs[1]
        for expert, row in enumerate(kept.logical_to_physical_map[layer]):
            count = kept.expert_count[layer, expert]
            assert (row[count:] == -1).all()
            at = kept.physical_to_logical_map[layer][row[:count]]
            assert (at == expert).all() and len({*row[:count].tolist()}) == count
    assert received(old, kept.physical_to_logical_map, gpus) <= received(
        old, new.physical_to_logical_map, gpus
    )
    same = maj.rebalance_experts(history[0], *sizes, algorithm=algorithm, previous=old)
    assert np.array_equal(same.physical_to_logical_map, old)


def test_kept_placement_moves_least_of_all_renamings():
    """Every order of four GPUs is tried."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        load = zipf(rng, 1, 8, tokens=300)
        old = rng.permuted(np.array([[*range(8), *rng.integers(0, 8, 4)]]), axis=1)
        new = maj.rebalance_experts(load, 12, 1, 1, 4).physical_to_logical_map
        kept = maj.rebalance_experts(load, 12, 1, 1, 4, previous=old).physical_to_logical_map
        packs = new.reshape(4, 3)
        least = min(
            received(old, packs[list(order)].reshape(1, 12), 4)
            for order in itertools.permutations(range(4))
        )
        assert received(old, kept, 4) == least


# -- the plan of moves ------------------------------------------------------------------------------------


@st.composite
def two_maps(draw):
    nodes, per_node, slots = (draw(st.integers(1, n)) for n in (3, 3, 4))
    gpus = nodes * per_node
    experts = draw(st.integers(1, gpus * slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def one():
        extra = rng.integers(0, experts, gpus * slots - experts)
        return rng.permutation([*range(experts), *extra])

    return np.array([one(), one()]), np.array([one(), one()]), gpus, nodes


@given(two_maps())
def test_plan_reads_each_expert_from_where_it_is_by_the_shortest_way(case):
    old, new, gpus, nodes = case
    moves = maj.plan_expert_moves(old, new, num_gpus=gpus, num_nodes=nodes)
    per_gpu = old.shape[1] // gpus
    assert moves.kind.dtype == np.int8 and moves.source.dtype == np.int32
    for layer in range(len(old)):
        senders: dict = {}
        for slot, (expert, kind, source) in enumerate(
            zip(new[layer], moves.kind[layer], moves.source[layer], strict=True)
        ):
            assert old[layer, source] == expert
            gpu, node = slot // per_gpu, slot // per_gpu // (gpus // nodes)
            holders = {int(p) // per_gpu for p in np.flatnonzero(old[layer] == expert)}
            near = {g for g in holders if g // (gpus // nodes) == node}
            mine = range(gpu * per_gpu, gpu * per_gpu + per_gpu)
            first = next(p for p in mine if new[layer, p] == expert)
            if old[layer, slot] == expert:
                assert kind == MoveKind.UNCHANGED and source == slot
            elif gpu in holders:
                assert kind == MoveKind.LOCAL_COPY and source // per_gpu == gpu
            elif first != slot:
                assert kind == MoveKind.FREE_RIDER and source == moves.source[layer, first]
            else:
                way = MoveKind.SAME_NODE if near else MoveKind.OTHER_NODE
                assert kind == way and source // per_gpu in (near or holders)
                key = (expert, node if near else None)
                senders.setdefault(key, (near or holders, []))[1].append(source // per_gpu)
        for holders, used in senders.values():
            # Even shares, contiguous among the receivers.
            shares = [used.count(g) for g in holders]
            assert max(shares) - min(shares) <= 1 and used == sorted(used)


def test_plan_of_some_layers():
    old, new = [[0, 1]] * 3, [[1, 0]] * 3
    moves = maj.plan_expert_moves(old, new, num_gpus=2).layers([1])
    assert moves.source.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert [moves.count(kind) for kind in MoveKind] == [4, 0, 0, 2, 0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"old": [[0.5, 1.0]]}, TypeError, "old must be integers"),
        ({"old": [0, 1]}, ValueError, "old must have shape"),
        ({"new": [[0, 1], [1, 0]]}, ValueError, "new must have the 1 layers of old"),
        ({"new": [[0, 2]]}, ValueError, "expert 2 in layer 0"),
        ({"num_gpus": 3}, ValueError, "num_gpus must divide"),
        ({"num_nodes": 4}, ValueError, "num_nodes must divide"),
    ],
)
def test_plan_refuses(changes, error, words):
    given_ = {"old": [[0, 1]], "new": [[1, 0]], "num_gpus": 2, "num_nodes": 1} | changes
    with pytest.raises(error, match=words):
        maj.plan_expert_moves(given_.pop("old"), given_.pop("new"), **given_)


# -- other slots and GPUs than before ---------------------------------------------------------------------


@st.composite
def resized(draw):
    """Maps of different slots and GPUs; a GPU of the old one is dead, some slots of the new one are empty."""
    gpus, nodes = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (6, 3)]))
    before, per_gpu, was = (draw(st.integers(1, 4)) for _ in range(3))
    experts = draw(st.integers(1, min(gpus * per_gpu, before * was)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, experts, (2, before * was))
    if before > 1:
        old.reshape(2, before, was)[:, rng.integers(before)] = -1
    new = np.full((2, gpus * per_gpu), -1)
    for layer in range(2):
        there = np.unique(old[layer][old[layer] >= 0])
        new[layer] = rng.choice(there, gpus * per_gpu)
    new[rng.random(new.shape) < 0.1] = -1
    return old, new, gpus, nodes, before, per_gpu, was


@given(resized())
def test_plan_between_different_sizes(case):
    old, new, gpus, nodes, before, per_gpu, was = case
    moves = maj.plan_expert_moves(old, new, num_gpus=gpus, num_nodes=nodes, old_num_gpus=before)
    assert moves.same_size == (old.shape == new.shape and gpus == before)
    size = gpus // nodes if nodes > 1 else max(gpus, before)
    for layer in range(2):
        for slot, expert in enumerate(new[layer].tolist()):
            kind, source = moves.kind[layer, slot], int(moves.source[layer, slot])
            gpu, place = divmod(slot, per_gpu)
            if expert < 0:
                assert kind == MoveKind.UNCHANGED and source == -1
                continue
            assert old[layer, source] == expert
            holders = {p // was for p in np.flatnonzero(old[layer] == expert).tolist()}
            mine = range(gpu * per_gpu, (gpu + 1) * per_gpu)
            first = next(p for p in mine if new[layer, p] == expert)
            stays = gpu < before and place < was and old[layer, gpu * was + place] == expert
            if stays:
                assert kind == MoveKind.UNCHANGED and source == gpu * was + place
            elif gpu in holders:
                assert kind == MoveKind.LOCAL_COPY and source // was == gpu
            elif slot != first:
                assert kind == MoveKind.FREE_RIDER and source == moves.source[layer, first]
            else:
                near = {g for g in holders if g // size == gpu // size}
                way = MoveKind.SAME_NODE if near else MoveKind.OTHER_NODE
                assert kind == way and source // was in (near or holders)


def test_plans_of_other_sizes_are_not_cut_by_layers():
    moves = maj.plan_expert_moves([[0, 1]], [[0, 1, 1]], num_gpus=1)
    with pytest.raises(ValueError, match="ExpertMoves.layers: the plan must be between"):
        moves.layers([0])
    with pytest.raises(ValueError, match="old_num_gpus must divide the 2 slots of old; got 3"):
        maj.plan_expert_moves([[0, 1]], [[0, 1, 1]], num_gpus=3)
    with pytest.raises(ValueError, match="old must hold experts, or -1; got -2"):
        maj.plan_expert_moves([[0, -2]], [[0, 0]], num_gpus=1)
    with pytest.raises(ValueError, match="expert 1 in layer 0. Its weights are nowhere"):
        maj.plan_expert_moves([[0, -1]], [[0, 1]], num_gpus=2)
    with pytest.raises(ValueError, match="must be an array, or lists of one length"):
        maj.plan_expert_moves([[0, 1], [0]], [[0, 1]], num_gpus=1)


@pytest.mark.parametrize(("before", "was"), [(6, 2), (2, 4), (4, 4), (4, 2), (3, 5), (4, 3)])
@pytest.mark.parametrize("dead", [False, True])
def test_kept_placement_of_other_sizes_moves_least(before, was, dead):
    """Every order of the four new GPUs is tried."""
    rng = np.random.default_rng(before * 10 + was)
    for _ in range(5):
        load = zipf(rng, 1, 8, tokens=300)
        old = rng.integers(0, 8, (1, before * was))
        if dead:
            old[0, was : 2 * was] = -1
        new = maj.rebalance_experts(load, 12, 1, 1, 4)
        kept = maj.rebalance_experts(
            load, 12, 1, 1, 4, previous=old, previous_num_gpus=before
        ).physical_to_logical_map
        held = [{*gpu} - {-1} for gpu in old.reshape(before, was).tolist()]
        held = (held + [set()] * 4)[:4]

        def received(packs, held=held):
            return sum(len({*p} - h) for p, h in zip(packs, held, strict=True))

        def stay(packs, old=old):
            there = zip(packs, old.reshape(before, was).tolist(), strict=False)
            return sum(a == b for pack, gpu in there for a, b in zip(pack, gpu, strict=False))

        packs = new.physical_to_logical_map.reshape(4, 3).tolist()
        orders = list(itertools.permutations(packs))
        least = min(map(received, orders))
        got = kept.reshape(4, 3).tolist()
        assert received(got) == least
        assert sorted(map(sorted, got)) == sorted(map(sorted, packs))
        most = max(
            stay(each)
            for order in orders
            if received(order) == least
            for each in itertools.product(*map(itertools.permutations, order))
        )
        assert stay(got) == most


# -- replicas on different GPUs ---------------------------------------------------------------------------


@given(problems(max_steps=3), st.sampled_from(["auto", "deepseek", "deepseek_vec"]))
def test_spread_replicas_are_on_different_gpus(problem, algorithm):
    """On as many as there are, of a node where groups stay on their node; else evenly over them."""
    history, sizes = problem
    replicas, groups, nodes, gpus = sizes
    placement = maj.rebalance_experts(history, *sizes, algorithm=algorithm, spread_replicas=True)
    hierarchical = algorithm == "auto" and groups % nodes == 0
    domain = gpus // nodes if hierarchical else gpus
    experts = history.shape[2] // (nodes if hierarchical else 1)
    most = -(-(replicas // gpus) // experts)  # copies on one GPU; 1 where slots allow
    per_gpu = placement.physical_to_logical_map.reshape(len(history[0]), gpus, -1)
    for layer, rows in enumerate(per_gpu.tolist()):
        count = np.bincount(sum(rows, []), minlength=history.shape[2])
        assert np.array_equal(count, placement.expert_count[layer])
        assert count.min() >= 1 and count.max() <= most * domain
        for row in rows:
            assert max(row.count(e) for e in row) <= most
        for expert, slots in enumerate(placement.logical_to_physical_map[layer]):
            used = slots[: count[expert]]
            assert (placement.physical_to_logical_map[layer, used] == expert).all()
            assert len({*used.tolist()}) == count[expert] and (slots[count[expert] :] == -1).all()


def test_spread_replicas_cost_little_balance_and_kept_ones_stay_spread():
    """DeepSeek-V3's sizes: twins without it, none with it."""
    rng = np.random.default_rng(0)
    load = zipf(rng, 58, 256, tokens=1_000_000)

    def twins(slots):
        rows = np.asarray(slots).reshape(58 * 32, -1).tolist()
        return sum(len({*row}) < len(row) for row in rows)

    def worth(slots):
        return maj.balancedness(maj.expected_physical_count(load, slots), 32).mean()

    for sizes in ((288, 1, 1, 32), (288, 8, 4, 32)):
        usual = maj.rebalance_experts(load, *sizes).physical_to_logical_map
        spread = maj.rebalance_experts(load, *sizes, spread_replicas=True)
        slots = spread.physical_to_logical_map
        assert twins(usual) > 0 and twins(slots) == 0
        assert worth(slots) > worth(usual) - 0.03
        kept = maj.rebalance_experts(load, *sizes, spread_replicas=True, previous=usual)
        assert twins(kept.physical_to_logical_map) == 0
    location = maj.ExpertLocation.from_counts(
        load, num_physical_experts=288, num_gpus=32, spread_replicas=True
    )
    assert twins(location.physical_to_logical_map) == 0


# -- sums beyond int64, and arrays without anything -------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        np.array([[[2**62, 1, 1, 1]]] * 4),
        np.array([[[2**63, 1, 1, 1]]], np.uint64),
        np.array([[[2**63, 1, 1, 1]]] * 3, np.uint64),
    ],
)
def test_sums_beyond_int64_do_not_wrap(steps):
    """The hot expert gets all the redundant slots, as the same loads in float64 say."""
    for algorithm in ("auto", "deepseek_vec"):
        got = maj.rebalance_experts(steps, 8, 1, 1, 4, algorithm=algorithm)
        assert got.expert_count.tolist() == [[5, 1, 1, 1]]
    for_gpu = maj.balancedness(steps.sum(axis=0, dtype=np.float64), 2)
    assert for_gpu.tolist() == pytest.approx([0.5])
    wide = np.full((1, 4), 2**62)
    assert maj.balancedness(wide, 2).tolist() == [1.0]
    assert maj.balancedness(np.full((1, 4), 60000, np.float16), 2).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0), (0, 2, 4), (2, 0, 4)])
def test_empty_arrays_are_refused_in_our_words(shape):
    empty = np.zeros(shape)
    with pytest.raises(ValueError, match="^balancedness: physical_count must hold at least one"):
        maj.balancedness(empty, 2)
    with pytest.raises(ValueError, match="^rebalance_experts: weight must have shape"):
        maj.rebalance_experts(empty, 4, 1, 1, 2)


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        ([[np.nan, 1]], ValueError, "be finite and at least 0; got nan"),
        ([[np.inf, 1]], ValueError, "be finite and at least 0; got inf"),
        ([[-1, 1]], ValueError, "be finite and at least 0; got -1"),
        ([["a", "b"]], TypeError, "be real numbers"),
        ([[1, 1j]], TypeError, "be real numbers"),
        ([[1, 2], [1]], ValueError, "lists of different lengths"),
    ],
)
def test_balancedness_refuses_what_counts_cannot_be(count, error, words):
    with pytest.raises(error, match=f"^balancedness: physical_count must .*{words}|{words}"):
        maj.balancedness(count, 2)


def test_expected_counts_need_a_map_of_integers_and_leave_empty_slots_idle():
    for bad in ([[0.0, 1.0]], [[True, False]], np.array([[0, 1.5]])):
        with pytest.raises(TypeError, match="physical_to_logical_map must be integers"):
            maj.expected_physical_count([[1, 2]], bad)
    with pytest.raises(TypeError, match="weight must be real numbers"):
        maj.expected_physical_count([["1", "2"]], [[0, 1]])
    got = maj.expected_physical_count([[6, 2]], [[0, -1, 1, 0, -1]])
    assert got.tolist() == [[3.0, 0.0, 2.0, 3.0, 0.0]]


@pytest.mark.parametrize("bad", [1, "yes", None, 1.0])
def test_spread_replicas_is_a_bool(bad):
    with pytest.raises(TypeError, match="spread_replicas must be a bool"):
        maj.rebalance_experts([[1, 2]], 2, 1, 1, 1, spread_replicas=bad)


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": [[1, -1, 2, 3]]}, ValueError, "at least 0 everywhere; got -1"),
        ({"weight": [[1, np.nan, 2, 3]]}, ValueError, "at least 0 everywhere; got nan"),
        ({"weight": [[1, np.inf, 2, 3]]}, ValueError, "finite float32 sums"),
        ({"weight": [[3e38, 3e38, 2, 3]]}, ValueError, "finite float32 sums"),
        ({"weight": [["a", "b", "c", "d"]]}, TypeError, "real numbers"),
        ({"weight": [1, 2, 3, 4]}, ValueError, "have shape"),
        ({"weight": np.zeros((0, 2, 4))}, ValueError, "have shape"),
        ({"num_replicas": 3}, ValueError, "number of experts, 4; got 3"),
        ({"num_replicas": 7}, ValueError, "multiple of num_gpus"),
        ({"num_replicas": 8.0}, TypeError, "num_replicas must be a static Python int"),
        ({"num_groups": 3, "num_nodes": 1}, ValueError, "divide the number of experts"),
        ({"num_gpus": 4, "num_nodes": 0}, ValueError, "num_nodes must be at least 1"),
        ({"num_groups": 4, "num_nodes": 4}, ValueError, "num_gpus must be a multiple"),
        (
            {"num_nodes": 4, "algorithm": "deepseek_hierarchical"},
            ValueError,
            "num_groups must be a multiple of num_nodes",
        ),
        ({"algorithm": "best"}, ValueError, "algorithm must be one of auto"),
        ({"previous": [[0, 1, 2]]}, ValueError, "previous must have a multiple of its GPUs"),
        ({"previous": [[0, 1]] * 2}, ValueError, r"previous must be an integer array \[1, slots\]"),
        ({"previous": [[0, 1, 2, 9] * 2]}, ValueError, "hold experts in"),
    ],
)
def test_rebalance_refuses(changes, error, words):
    options = {
        **{"weight": [[1, 2, 3, 4]], "num_replicas": 8},
        **{"num_groups": 2, "num_nodes": 2, "num_gpus": 2},
    } | changes
    with pytest.raises(error, match=f"^rebalance_experts: .*{words}"):
        maj.rebalance_experts(**options)


def test_measures_refuse_maps_that_do_not_fit():
    for bad in ([0, 1], [[0, 3]], [[0, -2]], [[0, 1], [1, 0]]):
        with pytest.raises(ValueError, match="physical_to_logical_map must"):
            maj.expected_physical_count([[1, 2]], bad)
    with pytest.raises(ValueError, match="num_gpus must divide"):
        maj.balancedness([[1, 2, 3]], 2)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (8, 4)])
def test_deepseek_v3_takes_a_fraction_of_a_second(groups, kept):
    """58 layers of 256 experts on 288 slots. Usual: 2 to 10 ms, and 20 to 30 with `previous`; a slow machine
    of CI took 54. The limit leaves room for slower ones; a loop in Python over the layers takes longer.
    What counts is the process's own time, the least of five: other processes do not."""
    rng = np.random.default_rng(0)
    load = zipf(rng, 58, 256, tokens=1_000_000)
    previous = None
    if kept:
        previous = maj.rebalance_experts(load, 288, *groups, 32).physical_to_logical_map
        load = rng.poisson(load * rng.lognormal(0, 0.3, load.shape))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        maj.rebalance_experts(load, 288, *groups, 32, previous=previous)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.25
