"""Published training runs, as the planner's input: shapes of models (not of the ERNIE family alone) and
runs, from tests/fixtures/published. Used by tools/plan_accuracy.py and by tests.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from erniekit.parallel.pipeline_split import Costs, split_layers
from erniekit.plan.flops import FULL, Recomputed, forward_flops
from erniekit.plan.hardware import load_hardware
from erniekit.plan.layout import Layout, Run
from erniekit.plan.timing import StepTime, step_time
from erniekit.plan.work import (
    Core,
    Layer,
    Product,
    Work,
    attention_products,
    attention_values,
    expert_products,
    head_layer,
    mlp_products,
    mlp_values,
    router_product,
    routing_values,
    scaled,
)

DIRECTORY = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "published"


def shapes() -> dict[str, dict[str, Any]]:
    """The sizes of each model by name."""
    return yaml.safe_load((DIRECTORY / "models.yaml").read_text("utf-8"))


def operations(name: str, ahead: bool = False) -> Work:
    """The operations of a published model; `ahead`: with its block for multi-token prediction."""
    shape = shapes()[name]
    hidden = shape["hidden"]
    layers = tuple(_layer(shape, number) for number in range(shape["layers"]))
    head = head_layer(hidden, shape["vocabulary"])
    last = [head]
    if ahead:
        join = Layer("join", hidden, (Product("mlp", 2 * hidden, hidden, tensor_split=""),), values=6.0 * hidden)
        last = [join, layers[-1], head, head]
    return Work(hidden, (), layers, tuple(last), hidden * shape["vocabulary"])


def _layer(shape: dict[str, Any], number: int) -> Layer:
    hidden, matrices = shape["hidden"], shape.get("matrices", 3)
    if "latent_attention" in shape:
        heads, query_rank, key_rank, plain, rotated, value = shape["latent_attention"]
        products = [
            Product("attention", hidden, query_rank, tensor_split=""),
            Product("attention", query_rank, heads * (plain + rotated)),
            Product("attention", hidden, key_rank + rotated, tensor_split=""),
            Product("attention", key_rank, heads * (plain + value)),
            Product("attention", heads * value, hidden, tensor_split="inputs"),
        ]
        cores = (Core(heads, heads, plain + rotated, value),)
        values = attention_values(hidden, heads, heads, plain + rotated) + 2.0 * (query_rank + key_rank)
    else:
        heads, kv_heads, size = shape["attention"]
        products = list(attention_products(hidden, heads, kv_heads, size))
        window = shape.get("window", 0) if number % 2 == 0 else 0
        cores = (Core(heads, kv_heads, size, size, window),)
        values = attention_values(hidden, heads, kv_heads, size)
    if "experts" not in shape or number < shape.get("dense_layers", 0):
        products += mlp_products(hidden, shape["mlp"], matrices=matrices)
        return Layer("dense", hidden, tuple(products), cores, values + mlp_values(hidden, shape["mlp"], matrices))
    top_k, experts, shared = shape["top_k"], shape["experts"], shape.get("shared", 0)
    products += [router_product(hidden, experts), *expert_products(hidden, shape["expert"], top_k, experts)]
    products += mlp_products(hidden, shared) if shared else ()
    values += mlp_values(hidden, shape["expert"] * top_k + shared)
    moved, hosts = routing_values(hidden, top_k), shape.get("top_hosts", 0)
    return Layer("sparse", hidden, tuple(products), cores, values, top_k, experts, bool(shared), moved, hosts)


_RECOMPUTED = {
    None: Recomputed(),
    "full": FULL,
    "core": Recomputed(core=1.0),
    "mlp": Recomputed(mlp=1.0, elementwise=0.5),
    "elementwise": Recomputed(elementwise=1.0),
    "half": Recomputed(attention=0.5, mlp=0.5, elementwise=1.0),  # torchtitan's "op": every second product
}


@dataclass(frozen=True)
class Published:
    """A published run with what the planner says; `reached` and `planned` in the unit of the source."""

    name: str
    group: str
    unit: str
    reached: float
    time: StepTime

    @property
    def gpus(self) -> int:
        """All devices."""
        return self.time.run.layout.gpus

    @property
    def planned(self) -> float:
        """The planner's number in the source's unit."""
        time = self.time
        return {
            "tokens": time.tokens_per_second_per_gpu,
            "step": time.seconds,
            "tflops": time.model_flops_per_second() / 1e12,
            "mfu": time.mfu(),
        }[self.unit]

    def shown(self, value: float) -> str:
        """A number with its unit."""
        if self.unit == "mfu":
            return f"{value:.1%} MFU"
        if self.unit == "step":
            return f"{value:.2f} s"
        return f"{value:,.0f} tokens/s/GPU" if self.unit == "tokens" else f"{value:.0f} TFLOP/s"


def published(names: Collection[str] | str = "") -> list[Published]:
    """The published runs of these names, or those whose name contains a text, planned."""
    rows = yaml.safe_load((DIRECTORY / "runs.yaml").read_text("utf-8"))
    if isinstance(names, str):
        return [_published(row) for row in rows if names in row["name"]]
    return [_published(row) for row in rows if row["name"] in names]


def _published(row: dict[str, Any]) -> Published:
    ((unit, reached),) = row["reached"].items()
    time = step_time(run_of_row(row), load_hardware(row["card"]))
    return Published(row["name"], row["group"], unit, reached, time)


def run_of_row(row: dict[str, Any]) -> Run:
    """The planner's input for a row of runs.yaml."""
    work = operations(row["model"], row.get("ahead", False))
    if row.get("both_ends"):  # a bidirectional pipeline: both ends have the head, each for half of the microbatches
        half = tuple(scaled(layer, 0.5) for layer in work.last)
        work = dataclasses.replace(work, first=half, last=half)
    data, microbatch = row.get("data", 1), row.get("microbatch", 1)
    tensor, chunks = row.get("tensor", 1), row.get("chunks", 1)
    layout = Layout(
        tensor=tensor,
        pipeline=row.get("pipeline", 1),
        chunks=chunks,
        expert=row.get("expert", 1),
        context=row.get("context", 1),
        data=data,
        sharding=data if row["zero"] else 1,
        zero_stage=row["zero"],
        sequence_parallel=tensor > 1 and not row.get("no_sequence_parallel", False),
        schedule="interleaved" if chunks > 1 else "1f1b",
        microbatches=row["batch"] // (data * microbatch),
        microbatch_tokens=microbatch * row["sequence"],
        lengths=(row["sequence"],),
        gpus_per_node=row.get("node", 8),
        precision=row.get("precision", "bf16"),
        fp8_parts=frozenset(row.get("fp8_parts", ("attention", "mlp", "experts"))),
        recomputed=_RECOMPUTED[row.get("recompute")],
        flash_attention=row.get("flash", True),
        fp8_dispatch=row.get("fp8_dispatch", False),
        deduplicated=row.get("deduplicated", False),
        overlap_tensor=row.get("overlap_tensor", False),
        overlap_expert=row.get("overlap_expert", False),
    )
    # Heads are in 16 bits, where a product takes about twice as long as in FP8.
    slower = 1.0 if layout.precision == "bf16" else 2.0
    lengths = list(layout.lengths)

    def cost(layers: tuple[Layer, ...]) -> float:
        return sum(forward_flops(layer, lengths) * (slower if layer.kind == "head" else 1.0) for layer in layers)

    costs = Costs(tuple(cost((layer,)) for layer in work.layers), cost(work.first), cost(work.last))
    numbers = split_layers(len(work.layers), layout.pipeline * chunks, "balanced", costs)
    return Run(work, layout, [numbers[stage :: layout.pipeline] for stage in range(layout.pipeline)])
