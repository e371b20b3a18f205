import asyncio

import pytest

from deployments.admission import WaitingRoom
from deployments.errors import Busy


async def test_who_comes_while_the_door_is_open_does_not_wait() -> None:
    room = WaitingRoom("m")
    room.open()
    await room.enter(wait_s=0.0, max_waiting=0)
    assert room.num_waiting == 0


async def test_who_waits_is_let_in_when_the_door_opens() -> None:
    room = WaitingRoom("m")
    waiting = asyncio.create_task(room.enter(wait_s=60.0, max_waiting=1))
    await asyncio.sleep(0)
    assert room.num_waiting == 1
    room.open()
    await waiting
    assert room.num_waiting == 0


async def test_who_waits_for_an_engine_that_is_given_up_is_sent_away() -> None:
    room = WaitingRoom("m")
    waiting = asyncio.create_task(room.enter(wait_s=60.0, max_waiting=1))
    await asyncio.sleep(0)
    room.close_for_good()
    with pytest.raises(Busy, match="gone for good"):
        await waiting
    room.open()
    with pytest.raises(Busy, match="gone for good"):
        await room.enter(wait_s=60.0, max_waiting=1)


async def test_who_comes_after_giving_up_is_sent_away_at_once_whatever_dies_later() -> None:
    room = WaitingRoom("m")
    room.close_for_good()
    room.close()  # the last life's end is heard after that
    async with asyncio.timeout(1):
        with pytest.raises(Busy, match="gone for good"):
            await room.enter(wait_s=600, max_waiting=1)
