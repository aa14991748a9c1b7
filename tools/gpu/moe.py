"""Cases of the gate, the order of choices by expert, and the way to the experts and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tools.gpu.case import Case, Shape, Tensors, dtype_of, normal, put_special, tag
from tools.gpu.library import Library

# Of the router and the experts of the 21B and the 300B model.
MODELS = {
    "21B": {"hidden": 2560, "experts": 64, "k": 6, "dtype": "bfloat16"},
    "300B": {"hidden": 8192, "experts": 64, "k": 8, "dtype": "bfloat16"},
}
SHAPES = {
    f"{model}, {tokens} tokens": {"tokens": tokens, **sizes, "multiple": 1}
    for model, sizes in MODELS.items()
    for tokens in (8192, 32768)
}
PADDED = {name: {**shape, "multiple": 128} for name, shape in SHAPES.items()}
MINIMUM = 1e-12
# Sums of float32 in another order, relative to the size of what is summed.
SUM = (1e-5, 1e-4)

# The gate. Logits lie on a grid, so that they are equal or far enough apart for any order of float32 operations.

GATE_EDGES = (
    {"tokens": 0, "experts": 8, "k": 2},
    {"tokens": 5, "experts": 8, "k": 8},
    {"tokens": 33, "experts": 64, "k": 6},
    {"tokens": 33, "experts": 64, "k": 6, "softmax": False},
    {"tokens": 7, "experts": 37, "k": 3},
    {"tokens": 9, "experts": 128, "k": 1},
    {"tokens": 100, "experts": 256, "k": 16},
    {"tokens": 3, "experts": 64, "k": 8, "special": torch.nan},
    {"tokens": 3, "experts": 64, "k": 8, "special": torch.inf},
    {"tokens": 3, "experts": 64, "k": 8, "special": -torch.inf},
)
GATE_GRAD_EDGES = tuple(shape for shape in GATE_EDGES if "special" not in shape)


def make_gate(generator: torch.Generator, shape: Shape) -> Tensors:
    """logits [tokens, experts], bias [experts]."""
    tokens, experts = shape["tokens"], shape["experts"]
    logits = (normal(generator, tokens, experts) * 64).round() / 64
    bias = (torch.rand(experts, generator=generator, device=generator.device) > 0.5) * 0.5
    return {"logits": put_special(logits, shape.get("special")), "bias": bias}


def run_gate(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """What the gate returns, and counts [experts]."""
    logits, (tokens, experts, k) = inputs["logits"], (shape["tokens"], shape["experts"], shape["k"])
    found = {
        "probabilities": torch.empty_like(logits),
        "indices": logits.new_empty(tokens, k, dtype=torch.int64),
        "weights": logits.new_empty(tokens, k),
        "counts": logits.new_empty(experts, dtype=torch.int64),
    }
    options = (k, shape.get("softmax", True), True, MINIMUM)
    library.call("ernie45_cuda_moe_gate", logits, inputs["bias"], tokens, experts, *options, *found.values())
    return found


def gate(inputs: Tensors, shape: Shape, stable: bool, dtype: torch.dtype) -> Tensors:
    """The definition; or with torch.topk, which leaves the order of equal scores open."""
    logits, k = inputs["logits"].to(dtype), shape["k"]
    probabilities = torch.softmax(logits, dim=-1) if shape.get("softmax", True) else torch.sigmoid(logits)
    scores = probabilities + inputs["bias"].to(dtype)
    if stable:
        indices = torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :k].contiguous()
    else:
        indices = torch.topk(scores, k, dim=-1).indices
    weights = torch.gather(probabilities, -1, indices)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=MINIMUM)
    counts = torch.bincount(indices.flatten(), minlength=shape["experts"])
    return {"probabilities": probabilities, "indices": indices, "weights": weights, "counts": counts}


def make_gate_grad(generator: torch.Generator, shape: Shape) -> Tensors:
    """What the gate returned, and the gradients of its probabilities and weights."""
    found = gate(make_gate(generator, shape), shape, stable=True, dtype=torch.float32)
    grads = {
        "grad_probabilities": normal(generator, shape["tokens"], shape["experts"]),
        "grad_weights": normal(generator, shape["tokens"], shape["k"]),
    }
    return {"probabilities": found["probabilities"], "indices": found["indices"], **grads}


def run_gate_grad(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """grad_logits [tokens, experts]"""
    grad = torch.empty_like(inputs["probabilities"])
    sizes = (shape["tokens"], shape["experts"], shape["k"], shape.get("softmax", True), True, MINIMUM)
    names = ("probabilities", "indices", "grad_probabilities", "grad_weights")
    library.call("ernie45_cuda_moe_gate_grad", *(inputs[name] for name in names), *sizes, grad)
    return {"grad_logits": grad}


def gate_grad(inputs: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
    """Through the division by the sum, then through the softmax or the sigmoid."""
    probabilities, grad = inputs["probabilities"].to(dtype), inputs["grad_probabilities"].to(dtype)
    chosen = torch.gather(probabilities, -1, inputs["indices"])
    total, by_weight = chosen.sum(dim=-1, keepdim=True), inputs["grad_weights"].to(dtype)
    shared = (by_weight * chosen / total).sum(dim=-1, keepdim=True)
    grad = grad.scatter_add(-1, inputs["indices"], (by_weight - shared) / total)
    if shape.get("softmax", True):
        return {"grad_logits": probabilities * (grad - (grad * probabilities).sum(dim=-1, keepdim=True))}
    return {"grad_logits": probabilities * (1 - probabilities) * grad}


# The order

ROW_EDGES = (
    {"tokens": 0, "hidden": 16, "experts": 8, "k": 2, "dtype": "bfloat16", "multiple": 1},
    {"tokens": 7, "hidden": 24, "experts": 8, "k": 1, "dtype": "float32", "multiple": 1},
    {"tokens": 9, "hidden": 37, "experts": 8, "k": 8, "dtype": "bfloat16", "multiple": 16},
    {"tokens": 65, "hidden": 264, "experts": 64, "k": 6, "dtype": "bfloat16", "multiple": 1},
    {"tokens": 33, "hidden": 520, "experts": 64, "k": 8, "dtype": "float16", "multiple": 128},
    {"tokens": 40, "hidden": 8, "experts": 64, "k": 1, "dtype": "float16", "multiple": 8, "same": True},
    {"tokens": 5, "hidden": 40, "experts": 4, "k": 2, "dtype": "float32", "multiple": 4, "special": torch.nan},
    {"tokens": 5, "hidden": 40, "experts": 4, "k": 2, "dtype": "bfloat16", "multiple": 1, "special": torch.inf},
)
SORT_EDGES = (*ROW_EDGES, {"tokens": 3000, "hidden": 0, "experts": 256, "k": 3, "dtype": "float32", "multiple": 16})


def make_indices(generator: torch.Generator, shape: Shape) -> Tensors:
    """indices [tokens, k], different in every row; if `same`, the same in all."""
    scores = torch.rand(shape["tokens"], shape["experts"], generator=generator, device=generator.device)
    indices = scores.argsort(dim=-1)[:, : shape["k"]].contiguous()
    return {"indices": indices[:1].expand_as(indices).contiguous() if shape.get("same") else indices}


def rows_of(shape: Shape) -> int:
    """Rows that hold every choice, whatever it is."""
    choices, multiple = shape["tokens"] * shape["k"], shape["multiple"]
    return (choices + min(shape["experts"], choices) * (multiple - 1)) // multiple * multiple


def run_sort(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """counts, offsets, slots and sources."""
    indices, (tokens, k, experts) = inputs["indices"], (shape["tokens"], shape["k"], shape["experts"])
    found = {
        "counts": indices.new_empty(experts),
        "offsets": indices.new_empty(experts + 1),
        "slots": torch.empty_like(indices),
        "sources": indices.new_empty(rows_of(shape), dtype=torch.int32),
    }
    workspace = indices.new_empty(library.call("ernie45_cuda_moe_sort_workspace", tokens, k, experts))
    library.call("ernie45_cuda_moe_sort", indices, tokens, k, experts, shape["multiple"], *found.values(), workspace)
    return found


def sort(inputs: Tensors, shape: Shape) -> Tensors:
    """With a stable sort."""
    chosen, multiple, k = inputs["indices"].flatten(), shape["multiple"], shape["k"]
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=shape["experts"])
    rows = (counts + multiple - 1) // multiple * multiple
    offsets = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    left_over_before = offsets[:-1] - (counts.cumsum(0) - counts)
    places = torch.arange(len(order), device=order.device) + left_over_before[chosen[order]]
    slots = torch.empty_like(chosen).scatter_(0, order, places)
    sources = torch.full([rows_of(shape)], -1, dtype=torch.int32, device=order.device)
    sources[slots] = (torch.arange(len(order), device=order.device) // k).int()
    return {"counts": counts, "offsets": offsets, "slots": slots.view_as(inputs["indices"]), "sources": sources}


# To the experts and back


def make_rows(generator: torch.Generator, shape: Shape) -> Tensors:
    """x [tokens, hidden], rows [rows, hidden], weights [tokens, k], slots, sources."""
    order, hidden, dtype = sort(make_indices(generator, shape), shape), shape["hidden"], dtype_of(shape)
    x = put_special(normal(generator, shape["tokens"], hidden, dtype=dtype), shape.get("special"))
    rows = put_special(normal(generator, rows_of(shape), hidden, dtype=dtype), shape.get("special"))
    weights = torch.rand(shape["tokens"], shape["k"], generator=generator, device=generator.device)
    return {"x": x, "rows": rows, "weights": weights, "slots": order["slots"], "sources": order["sources"]}


def sizes_of(shape: Shape) -> tuple[int, int, int, int]:
    """tokens, k, hidden, rows"""
    return shape["tokens"], shape["k"], shape["hidden"], rows_of(shape)


def sources_of(inputs: Tensors, shape: Shape) -> torch.Tensor | None:
    """What the kernels need where some rows hold no token."""
    return inputs["sources"] if shape["multiple"] > 1 else None


def run_permute(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """out [rows, hidden]"""
    x, slots = inputs["x"], inputs["slots"]
    out = torch.empty_like(inputs["rows"])
    library.call("ernie45_cuda_moe_permute", x, slots, sources_of(inputs, shape), *sizes_of(shape), tag(x), out)
    return {"out": out}


def permute(inputs: Tensors, shape: Shape) -> Tensors:
    """Each token in all of its rows."""
    x, sources = inputs["x"], inputs["sources"].long()
    if shape["multiple"] == 1:
        return {"out": x[sources]}
    return {"out": torch.where(sources.unsqueeze(-1) >= 0, x[sources.clamp(min=0)] if len(x) else 0, 0).to(x.dtype)}


def run_permute_grad(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """grad_x [tokens, hidden]"""
    rows = inputs["rows"]
    grad = torch.empty_like(inputs["x"])
    library.call("ernie45_cuda_moe_permute_grad", rows, inputs["slots"], *sizes_of(shape), tag(rows), grad)
    return {"grad_x": grad}


def run_combine(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """out [tokens, hidden]"""
    rows, weights = inputs["rows"], inputs["weights"]
    out = torch.empty_like(inputs["x"])
    tags = (tag(rows), tag(weights))
    library.call("ernie45_cuda_moe_combine", rows, inputs["slots"], weights, *sizes_of(shape), *tags, out)
    return {"out": out}


def run_combine_grad(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """grad_rows [rows, hidden], grad_weights [tokens, k]; x is the gradient of what combine returned."""
    rows, weights = inputs["rows"], inputs["weights"]
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    given = (rows, inputs["slots"], weights, inputs["x"], sources_of(inputs, shape))
    sizes = (*sizes_of(shape), tag(rows), tag(weights))
    library.call("ernie45_cuda_moe_combine_grad", *given, *sizes, grad_rows, grad_weights)
    return {"grad_rows": grad_rows, "grad_weights": grad_weights}


def chosen_rows(inputs: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, k, hidden]"""
    slots, rows = inputs["slots"], inputs["rows"].to(dtype)
    return rows[slots.flatten()].view(*slots.shape, rows.shape[-1])


def combine(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The weighted sum of the rows of each token."""
    return {"out": (chosen_rows(inputs, dtype) * inputs["weights"].to(dtype).unsqueeze(-1)).sum(dim=1)}


def combine_grad(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The gradients of `combine`."""
    grad, slots = inputs["x"].to(dtype).unsqueeze(1), inputs["slots"].flatten()
    by_choice = (inputs["weights"].to(dtype).unsqueeze(-1) * grad).flatten(0, 1)
    grad_rows = torch.zeros(inputs["rows"].shape, dtype=dtype, device=slots.device).index_copy(0, slots, by_choice)
    return {"grad_rows": grad_rows, "grad_weights": (chosen_rows(inputs, dtype) * grad).sum(dim=-1)}


def gate_bytes(shape: Shape, rows: int) -> int:
    """Of so many float32 rows of all experts, and of the indices and weights."""
    return shape["tokens"] * (4 * rows * shape["experts"] + 12 * shape["k"])


def moved_bytes(shape: Shape, of_tokens: int, of_rows: int) -> int:
    """Of so many tensors of tokens, and of rows that hold one, with their slots and weights."""
    tokens, choices = shape["tokens"], shape["tokens"] * shape["k"]
    return (of_tokens * tokens + of_rows * choices) * shape["hidden"] * dtype_of(shape).itemsize + 12 * choices


def permute_cases() -> list[Case]:
    """Without and with rows that are left over, which are written, too."""

    def case(name: str, shapes: Mapping[str, Shape], edges: tuple[Shape, ...]) -> Case:
        return Case(
            name=name,
            shapes=shapes,
            edges=edges,
            make=make_rows,
            run=run_permute,
            reference=lambda inputs, shape: permute({**inputs, "x": inputs["x"].double()}, shape),
            eager=permute,
            bytes=lambda shape: (shape["tokens"] + rows_of(shape)) * shape["hidden"] * dtype_of(shape).itemsize,
            tolerance={"out": (0.0, 0.0)},
        )

    return [case("moe_permute", SHAPES, ROW_EDGES), case("moe_permute to multiples of 128", PADDED, ())]


CASES = [
    Case(
        name="moe_gate",
        shapes=SHAPES,
        edges=GATE_EDGES,
        make=make_gate,
        run=run_gate,
        reference=lambda inputs, shape: gate(inputs, shape, stable=True, dtype=torch.float64),
        eager=lambda inputs, shape: gate(inputs, shape, stable=False, dtype=torch.float32),
        bytes=lambda shape: gate_bytes(shape, 2),
    ),
    Case(
        name="moe_gate gradient",
        shapes=SHAPES,
        edges=GATE_GRAD_EDGES,
        make=make_gate_grad,
        run=run_gate_grad,
        reference=lambda inputs, shape: gate_grad(inputs, shape, torch.float64),
        eager=lambda inputs, shape: gate_grad(inputs, shape, torch.float32),
        bytes=lambda shape: gate_bytes(shape, 3),
    ),
    Case(
        name="moe_sort",
        shapes=PADDED,
        edges=SORT_EDGES,
        make=make_indices,
        run=run_sort,
        reference=sort,
        eager=sort,
        bytes=lambda shape: 16 * shape["tokens"] * shape["k"] + 4 * rows_of(shape),
    ),
    *permute_cases(),
    Case(
        name="moe_permute gradient",
        shapes=SHAPES,
        edges=ROW_EDGES,
        make=make_rows,
        run=run_permute_grad,
        reference=lambda inputs, shape: {"grad_x": chosen_rows(inputs, torch.float64).sum(dim=1)},
        eager=lambda inputs, shape: {"grad_x": chosen_rows(inputs, dtype_of(shape)).sum(dim=1)},
        bytes=lambda shape: moved_bytes(shape, 1, 1),
        tolerance={"grad_x": SUM},
    ),
    Case(
        name="moe_combine",
        shapes=SHAPES,
        edges=ROW_EDGES,
        make=make_rows,
        run=run_combine,
        reference=lambda inputs, shape: combine(inputs, torch.float64),
        eager=lambda inputs, shape: combine(inputs, dtype_of(shape)),
        bytes=lambda shape: moved_bytes(shape, 1, 1),
        tolerance={"out": SUM},
    ),
    Case(
        name="moe_combine gradient",
        shapes=SHAPES,
        edges=ROW_EDGES,
        make=make_rows,
        run=run_combine_grad,
        reference=lambda inputs, shape: combine_grad(inputs, torch.float64),
        eager=lambda inputs, shape: combine_grad(inputs, dtype_of(shape)),
        bytes=lambda shape: moved_bytes(shape, 1, 2),
        tolerance={"grad_weights": (1e-5, 1e-3)},
    ),
]
