"""Every operation on files of a run, its recovery, an extension and a re-roll fails once, in every way; takes no Ray.

SLICE=2/6 takes the second of six slices.
"""

import asyncio
import logging
import os

import pytest

from tests.unit.test_one_failure import experiment
from tests.unit.test_power_loss import REUSING

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")]

SLICE, SLICES = map(int, os.environ.get("SLICE", "1/1").split("/"))
LIVES = {"plain": {}, "reuse": REUSING, "keep": {"output": {"keep_segments": 2}}}


@pytest.mark.parametrize("changes", LIVES.values(), ids=LIVES)
def test_no_single_failure_costs_a_run_a_byte(tmp_path, caplog, changes):
    caplog.set_level(logging.CRITICAL)
    bad = []

    async def fail_every():
        await lives.prepare()
        for failure in lives.every()[SLICE - 1 :: SLICES]:
            try:
                await lives.fail(*failure)
            except Exception as error:
                bad.append(f"{error.__notes__[-1]}: {type(error).__name__}: {error}")
                await lives.restart()
        await lives.crew.end()

    lives = experiment(tmp_path, **changes)
    asyncio.run(fail_every())
    print(f"\n{lives.operations}; failed {lives.failed[True]}, never came {lives.failed[False]}")
    print(*(f"{count} refused: {said}" for said, count in lives.refused.items()), sep="\n")
    print(*(f"{count} ended: {said}" for said, count in lives.ended.items()), sep="\n")
    assert bad == []
