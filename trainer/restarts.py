"""Starting a run again after a failure, unattended: from its newest whole checkpoint.

What a run does follows from its checkpoint alone, so a run that was started again ends with the
same adapters, bit for bit on the same plan, as one that was not disturbed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lobra.common.errors import ConfigError, MachineError
from lobra.common.files import remove_folder
from lobra.common.words import counted
from lobra.layout.plan import load_plan
from lobra.model.launch import Interrupted
from lobra.model.rank_results import RankError
from lobra.trainer.checkpoint import newest_whole, read_state
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.live_tasks import at_checkpoint
from lobra.trainer.log_parts import log_files, remove_log
from lobra.trainer.rank import RankResult
from lobra.trainer.replanner import note_move
from lobra.trainer.run_config import note_restart
from lobra.trainer.run_folder import occupied
from lobra.trainer.run_spec import ADAPTER_FOLDER, PLAN_FOLDER, RunSpec
from lobra.trainer.signals import interruptible
from lobra.trainer.survivors import gpus_left, survivors_plan

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  # doubled while a run comes no further
FINAL_EXIT_CODES = (0, 2, 130, 143)  # of a launcher: done, a mistake, stopped


class Restarts:
    """Counts the restarts of a run, and says from where and when each begins."""

    def __init__(self, folder: Path, most: int) -> None:
        """Allow a run in this folder so many restarts."""
        self._folder = folder
        self._most = most
        self._made = 0
        self._in_vain = 0
        self._step: int | None = None

    @property
    def are_left(self) -> bool:
        """Whether another is allowed."""
        return self._made < self._most

    def next(self, why: str) -> int | None:
        """Say that the run starts again, wait, and return the step to go on from (None: anew)."""
        step = newest_step(self._folder)
        self._made += 1
        self._in_vain = 0 if (step or 0) > (self._step or 0) else self._in_vain + 1
        self._step = step
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._in_vain)
        where = "from its start" if step is None else f"from step {step}"
        log.warning(
            "%s\nrestart %d of %d, %s, in %.0f s", why, self._made, self._most, where, pause_s
        )
        time.sleep(pause_s)
        if step is None:
            forget_steps(self._folder)
        return step


def newest_step(folder: Path) -> int | None:
    """Return a run's newest checkpoint that is whole, None if none is; say which are damaged."""
    step, broken = newest_whole(folder)
    for damage in broken:
        log.warning("%s; the one before is taken", damage)
    return step


def run_with_restarts(
    run: RunSpec, most: int, start: Callable[[RunSpec], list[RankResult]]
) -> list[RankResult]:
    """Return what a run returns that is started again after failures, `most` times in all.

    It is also when its ranks have ended for another plan (`trainer.replanner`).

    Raises
    ------
    RankError, MachineError
        The last failure, with a note how to go on.
    Interrupted
        A stop signal came while there was nothing to save, with such a note if there are steps.
    """
    restarts = Restarts(run.output_dir, most)
    given = run
    while True:
        try:
            results = start(run)
        except Interrupted as interruption:
            if list_checkpoints(run.output_dir):
                interruption.add_note(how_to_go_on(run.output_dir))
            raise
        except (RankError, MachineError) as error:
            if not restarts.are_left:
                error.add_note(how_to_go_on(run.output_dir))
                raise
            try:
                with _pause(run.output_dir):
                    step = restarts.next("\n".join([str(error), *getattr(error, "__notes__", ())]))
                    given = _on_what_is_left(given, step)
            except ConfigError as refusal:
                error.add_note(f"GPUs are lost, and there is no plan for the rest: {refusal}")
                error.add_note(how_to_go_on(run.output_dir))
                raise error from None
        else:
            if (plan := results[0].next_plan) is None:
                return results
            step = list_checkpoints(run.output_dir)[-1]
            given = given.on_plan(load_plan(plan))
        revive = given.revive if step == given.resume_step else ()  # later ones have them alive
        run = note_restart(replace(_at_step(given, step), resume_step=step, revive=revive))


@contextmanager
def _pause(folder: Path) -> Iterator[None]:
    """Have a stop signal between two starts of a run raise `Interrupted`, with how to go on."""
    try:
        with interruptible():
            yield
    except Interrupted as interruption:
        interruption.add_note(how_to_go_on(folder))
        raise


def _at_step(run: RunSpec, step: int | None) -> RunSpec:
    """Return a run with the tasks it had after so many steps; None: at its start."""
    if step is None:
        return run
    return at_checkpoint(run, read_state(run.output_dir, step, whole=False))


def _on_what_is_left(run: RunSpec, step: int | None) -> RunSpec:
    """Return a run on a plan for the GPUs that are left, if it needs more and may be planned anew.

    Raises
    ------
    ConfigError
        There is no such plan.
    """
    needed = run.plan.num_gpus
    if run.replanning is None or (left := gpus_left(run)) >= needed:
        return run
    found = survivors_plan(run, step, [left])
    why = f"{left} of {needed} GPUs are left"
    log.warning("%s", note_move(run.output_dir, found, run.plan, step or 0, why))
    return run.on_plan(found.plan).on_gpus(left, left)


def launch_with_restarts(
    command: Callable[[int | None, Path | None], Sequence[str]],
    launch: Callable[[Sequence[str]], int],
    folder: Path,
    most: int,
    after_failure: Callable[[int | None, Path | None], Path | None] = lambda _, plan: plan,
) -> int:
    """Return the exit code of a launcher that is started again after failures.

    It is also when its ranks have ended for another plan.

    Parameters
    ----------
    command
        The launcher's command for a run that goes on from a step and on a plan (None: as the user
        gave it).
    launch
        Runs a command and returns its exit code.
    folder
        The run's, in which there was nothing of a run, or the run that goes on.
    most
        How many restarts there may be.
    after_failure
        Given where the run goes on from, and the plan it has, waits for what the launcher needs;
        returns the plan to go on on.

    Raises
    ------
    Interrupted
        A stop signal came between two starts, with a note how to go on.
    """
    restarts = Restarts(folder, most)
    step, plan = None, None
    while True:
        before = _plans_in(folder)
        code = launch(command(step, plan))
        if code == 0 and (chosen := _plans_in(folder) - before):
            step = list_checkpoints(folder)[-1]
            ((plan, _),) = chosen
        elif code in FINAL_EXIT_CODES:
            return code
        elif not restarts.are_left:
            log.error("the launcher ended with exit code %d; %s", code, how_to_go_on(folder))
            return code
        else:
            with _pause(folder):
                step = restarts.next(f"the launcher ended with exit code {code}")
                plan = after_failure(step, plan)


def _plans_in(folder: Path) -> set[tuple[Path, int]]:
    """Return the plans that a run was to go on on so far, and when each was written."""
    return {(file, file.stat().st_mtime_ns) for file in (folder / PLAN_FOLDER).glob("*.yaml")}


def forget_steps(folder: Path) -> None:
    """Remove what a run that has no checkpoint has left of its steps."""
    remove_log(log_files(folder))
    if (folder / ADAPTER_FOLDER).exists():
        remove_folder(folder / ADAPTER_FOLDER)


def how_to_go_on(folder: Path) -> str:
    """Return what to do about a run that has failed."""
    steps = list_checkpoints(folder)
    if not steps:
        how = "in another --output-dir" if occupied(folder) else "with the same command"
        return f"no checkpoint was saved in {folder}: begin anew, {how}"
    return (
        f"its last checkpoint is {step_folder(folder, steps[-1])}, after "
        f"{counted(steps[-1], 'step')}: go on with the same command and --resume, or unattended "
        f"with --max-restarts"
    )
