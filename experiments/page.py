"""The page of LobRA's experiments, docs/reproduction.md, written from their tables.

Every number in its sentences is one of the tables or computed from them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from experiments import page_tables as tables_of
from experiments.methods import BALANCED, DYNAMIC, FUSED, LOBRA, OURS, SEQUENTIAL
from experiments.page_tables import LABELS, Row, Tables, find, of_model, percent
from experiments.published import REDUCTION, SETUPS
from lobra.common.errors import ConfigError


def write_page(tables: Tables, folder: str) -> str:
    """Return the page.

    Parameters
    ----------
    tables
        Of all experiments of `LABELS`, and ``baselines``.
    folder
        Where they are, as the page links to it.

    Raises
    ------
    ConfigError
        If some are missing.
    """
    missing = [name for name in (*LABELS, "baselines") if name not in tables]
    if missing:
        raise ConfigError(f"{folder}: no tables of {', '.join(missing)}")
    sections = [
        _introduction(folder),
        _made(tables),
        _compared(tables),
        _methods(tables, folder),
        _savings(tables),
        _ablation(tables),
        _deployments(tables),
        _planning(tables),
        _scaling(tables, folder),
        _buckets(tables),
        _cost_model(tables),
        _baselines(tables),
    ]
    blocks = "\n\n".join(section.strip() for section in sections).split("\n\n")
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    """Return a paragraph, or a list's items, in lines of at most 100 characters."""
    if block.startswith(("#", "|", "```", "![")):
        return block
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            100,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in re.split(r"\n(?=- )", block)
    )


def _introduction(folder: str) -> str:
    return f"""
# LobRA's experiments, by simulation

The authors of "LobRA: Multi-tenant Fine-tuning over Heterogeneous Data" (PVLDB 18(8), 2025,
arXiv 2509.01193) published figures, tables, a profile of Llama2-7B and the plans they deployed.
This page puts our values beside theirs. **No GPU was used**: every step time of ours is
simulated under a cost model. `lobra experiment page` writes the page from the CSVs in
[{folder}]({folder}), which have more columns and rows.

`<tp,pp>` is a *layout*: tp GPUs share each layer, pp groups of them share the layers. `<8,1>x2`
is two *replicas* of `<8,1>`, and a *plan* says which replicas are deployed. A *bucket* is a
length that sequences are padded to. *GPU-seconds* are a step's seconds times the GPUs there are,
used or not."""


def _made(tables: Tables) -> str:
    return f"""
## How the tables were made

```bash
bash experiments/expr_7b.sh --simulate
bash experiments/expr_7b.sh --simulate --seed 1 --output exp_result/expr_7b_seed1
bash experiments/expr_7b.sh --simulate --estimate --output exp_result/expr_7b_estimate
bash experiments/expr_32b.sh --simulate
bash experiments/expr_70b.sh --simulate
lobra report exp_result/expr_7b                # pictures and all tables of one experiment
lobra experiment page --collect exp_result     # this page, from results of your own
```

Those of this page were made {tables_of.made(tables)}. Other versions of planner and simulator
give other numbers; the last command names the experiments that were made by other code than is
there. `provenance.json` beside the CSVs says what they were made from. Without `--simulate` the
scripts profile, plan and train on a cluster (`--dry-run` shows the jobs); that has not been
done."""


def _compared(tables: Tables) -> str:
    lengths: Sequence[Row] = tables[of_model("70B")]["lengths"]
    steps = find(tables["expr_7b"]["methods"], method=OURS)["steps"]
    apart = [row["dataset"] for row in lengths if abs(float(row["kurtosis_error"])) > 0.01]
    return f"""
## What is compared

- **Profiles.** 7B on A100-40GB: the authors' own measurements. 32B and 70B on A800-80GB: our
  estimates of their runtime ([profiling](profiling.md)); of these models no profile was
  published.
- **Lengths** are synthetic. Mean, skewness and kurtosis are those published for each of the
  twelve data sets ({", ".join(apart) or "none"} excepted, where they are not reached together).
  The rest of their shape is not known, and long sequences decide much of what follows.
- **{SEQUENTIAL}** trains one task after another, **{FUSED}** all together: the published
  homogeneous plans (where one does not fit our estimate, the best that does), LobRA's seven
  fixed buckets, and every bucket dealt evenly to the replicas.
- **"{BALANCED.strip(", ")}"** gives a baseline our dispatcher, which balances the replicas, and
  the best plan of one layout for it; **"{DYNAMIC.split(", ")[-1]}"** also buckets chosen anew in
  each step. With both it has all that the plans have except different layouts.
- **{LOBRA}** is the published one, **{OURS}** that of our planner EXACT; both with 16 dynamic
  buckets and our dispatcher. "Capacities as LobRA measures" rounds memory down to powers of two
  tokens; otherwise it is known to 256 tokens.{_packed(tables)}
- All methods get the same {steps} sampled steps. Their means are certain within
  {tables_of.largest_interval(tables):.1f} % (95 %), the cost model and the lengths not.
  Embedding, head and the synchronisation of adapters are left out, as in LobRA's cost model."""


def _packed(tables: Tables) -> str:
    """Return what packed rows are, if there are any: older tables have none."""
    methods = (row["method"] for model in SETUPS for row in tables[of_model(model)]["methods"])
    if tables_of.PACKED not in methods:
        return ""
    return """
- **Packed** is EXACT's plan for sequences laid end to end instead of padded. "Half the
  activation memory" and "a quarter" have two and four times the capacities and the same times
  (a memory policy takes time too)."""


def _methods(tables: Tables, folder: str) -> str:
    changes = [f"{tables_of.change(tables, model):+.1f} % ({model})" for model in SETUPS]
    return f"""
## GPU-seconds of a step

{tables_of.methods(tables)}

Our plan's steps against those of LobRA's plan: {", ".join(changes)}.

![GPU-seconds, 7B]({folder}/gpu_seconds_7b.png)"""


def _savings(tables: Tables) -> str:
    published = f"{100 * REDUCTION[0]:.2f} to {100 * REDUCTION[1]:.2f} %"
    alone = [
        percent(find(tables[of_model(model)]["methods"], method=name)["less_than_fused_dynamic"], 1)
        for model in SETUPS
        for name in (LOBRA, OURS)
    ]
    return f"""
## What mixed layouts save

Published: LobRA takes {published} fewer GPU-seconds than the baselines, over all three models
and both baselines. Here:

{tables_of.savings(tables)}

- *LobRA's plan* against {SEQUENTIAL} and {FUSED} is, for 7B,
  {tables_of.beside_published(tables, "7B")}; for 32B
  {tables_of.beside_published(tables, "32B")}; for 70B
  {tables_of.beside_published(tables, "70B")}. There {FUSED}'s `<16,1>` spans two nodes; our
  estimate of that link may be too poor.
- *Mixed layouts alone* are the last column: LobRA's plan and ours save {alone[0]} and {alone[1]}
  % (7B), {alone[2]} and {alone[3]} % (32B), {alone[4]} and {alone[5]} % (70B). The rest of the
  other columns is owed to more and dynamic buckets and to dispatch, which serve plans of one
  layout too.
- *7B, estimated profile* has our estimate in place of the measurements. It lets `<4,2>` hold
  16,384 tokens where 8,192 were measured, which helps the baselines.
- Another seed of lengths and steps changes 7B's savings by
  {tables_of.moved_by_another_seed(tables):.1f} points at most."""


def _ablation(tables: Tables) -> str:
    return f"""
## Ablation

By how much less GPU-seconds than {FUSED} as published:

{tables_of.ablation(tables)}

Length-based dispatch sends all sequences of one length to one layout. It is not meant for our
plans, whose few replicas for long sequences are expected to take short ones too. The values of
the paper's ablation are not in a form we have."""


def _deployments(tables: Tables) -> str:
    same = {
        model: [row["same"] for row in tables[of_model(model)]["sequential"]] for model in SETUPS
    }
    counts = [f"{own.count('True')} of {len(own)} ({model})" for model, own in same.items()]
    return f"""
## Plans

Times of the expected batch, by one exact evaluation for all. "LobRA's methods": the best of
BALANCE, GROUP and PRUNE ([planning](planning.md)) on the layouts LobRA proposes, with 20 s each.
EXACT has all layouts; the lower bound is on all plans. Capacities are in powers of two.

{tables_of.deployments(tables)}

The published plans for 70B on 128 and 256 GPUs have one `<16,1>` for all sequences above 8,192
tokens, which our lengths have more of than LobRA's can have had. For 32B our estimate holds
7,936 tokens on `<4,1>`, of which LobRA deployed two for 8,192. {SEQUENTIAL}'s plan of each data
set is the one that is best here for {", ".join(counts)}."""


def _planning(tables: Tables) -> str:
    return f"""
## Time to plan

Seconds for 70B with four tasks; published ones end at 3,600 s, ours are stopped at 20 s with the
best plan so far. "Refused": more than two million plans to list. BALANCE here is not LobRA's
program.

{tables_of.planning(tables)}"""


def _scaling(tables: Tables, folder: str) -> str:
    steps = [
        float(find(tables["expr_70b"]["scale_gpus"], gpus="16", method=name)["step_time_s"])
        for name in (FUSED, f"{FUSED}, 16 fixed buckets", OURS)
    ]
    share = (steps[0] - steps[1]) / (steps[0] - steps[2])
    tasks = tables["expr_70b"]["scale_tasks"]
    grown = {
        name: [float(find(tasks, tasks=n, method=name)["gpu_seconds"]) for n in ("4", "16")]
        for name in (OURS, FUSED)
    }
    times = {name: last / before for name, (before, last) in grown.items()}
    return f"""
## More GPUs, more tasks

70B, GPU-seconds relative to {FUSED} in the first row. With four tasks, on more and more GPUs:

{tables_of.scaling(tables, "gpus")}

![over GPUs]({folder}/scale_gpus.png)

{FUSED} rises because dealing evenly leaves one replica with the odd long sequence; with our
dispatcher it does not. On 16 GPUs every method has the one plan `<16,1>`, and yet the levels
differ, by {steps[0]:.0f} s against {steps[2]:.0f} s a step: {percent(share)} % of that is 16
buckets instead of seven, the rest that they are dynamic. The published curves begin together, so
LobRA's {FUSED} may have had its buckets, or each curve is relative to itself. Only differences
along a column are comparable.

On 64 GPUs, with the four tasks once to four times (which tasks LobRA added is not known):

{tables_of.scaling(tables, "tasks")}

Four times the tasks take {times[OURS]:.2f} times our GPU-seconds (published 3.88) and
{times[FUSED]:.2f} times those of {FUSED} (4.41). That it grew more than the tasks means that
LobRA's further tasks were longer."""


def _buckets(tables: Tables) -> str:
    falls = []
    for model in SETUPS:
        own = tables[of_model(model)]["buckets"]
        few, many = (
            float(find(own, plan_of="LobRA", buckets=number)["step_time_s"])
            for number in ("12", "32")
        )
        falls.append(f"{percent(1 - many / few)} % ({model})")
    return f"""
## The number of buckets

{tables_of.buckets(tables)}

These are LobRA's plans. Padding falls as published. The published step time is flat beyond 12
buckets; here it falls by another {", ".join(falls)} up to 32."""


def _cost_model(tables: Tables) -> str:
    steps = [abs(float(row["difference"])) for row in tables["expr_7b"]["homogeneous_steps"]]
    measured = find(tables["expr_7b"]["homogeneous_steps"], plan="<1,1>x16")["measured_lobra_s"]
    by_step = 4 * 2.048 / float(measured)  # micro-batches x thousand tokens
    rows = tables["expr_7b"]["throughput"]
    flat = [float(row["difference"]) for row in rows if row["layout"].endswith(",1>")]
    deep = [float(row["difference"]) for row in rows if not row["layout"].endswith(",1>")]
    bare = [float(row["no_bubble_difference"]) for row in rows if not row["layout"].endswith(",1>")]
    return f"""
## The cost model against published measurements

Steps of homogeneous plans, 7B on 16 A100-40GB, global batch 64:

{tables_of.homogeneous_steps(tables)}

Mean error {percent(sum(steps) / len(steps), 1)} %, largest {percent(max(steps), 1)} %. The
published throughputs of {len(rows)} single layouts are less well met: {_range(flat)} without
pipelines, {_range(deep)} with, charging the idle time of 16 micro-batches, and {_range(bare)}
without that. Those throughputs and the published steps disagree with each other: `<1,1>` at
2,048 tokens has 5.11 thousand tokens a second in the one, {by_step:.2f} by the other."""


def _range(shares: Sequence[float]) -> str:
    return f"{percent(min(shares), 0, '+')} to {percent(max(shares), 0, '+')} %"


def _baselines(tables: Tables) -> str:
    rows = tables["baselines"]["baselines"]
    about = rows[0]
    return f"""
## Baselines as real trainers

`python -m benchmarks baselines` trains one adapter with PyTorch's tensor parallelism, with FSDP2
and PEFT, with a pipeline, and with this project, on the same sequences: {about["ranks"]}
{about["device"].upper()} ranks on {about["cores"]} cores, the {about["model"]} model, fp32.

{tables_of.baselines(tables)}

The losses agree to {about["losses_apart"]}, so all compute the same. Ranks outnumber cores here,
so the seconds show overheads, not what GPUs would do."""
