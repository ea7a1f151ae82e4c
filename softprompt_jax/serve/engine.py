"""Continuous batching in one thread: requests wait in a queue, join free slots, and leave when they are done.

A request has one or more answers: each generated sample, and each word to score, which is an answer with every token
forced. They share one run of the encoder.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import heapq
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.distributed.mesh import row_shards
from softprompt_jax.inference import programs
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.prompt_cache import HostPrompt, padded
from softprompt_jax.inference.texts import no_numbers
from softprompt_jax.models import continuous_batching, decode, per_example
from softprompt_jax.serve.jobs import Answer, Job
from softprompt_jax.serve.limits import Limits, RequestError

_SHORTEST = 32  # encoder positions; longer ones are four times as many, up to the limit
_STEP_S = 5.0  # seconds that `stop` waits beyond the longest request, for a step in progress
_STEPS = 4  # decoding steps between two looks at the queue, if no request waits or streams


class Engine:
    """Answers requests for the prompts of a bank, any mix of them at once.

    One thread runs the model and brings prompts onto the device. These shapes are compiled before the first request:
    the encoder for 1 and for `programs.JOINED` texts, a step with an eighth of the slots (on one device) and with all,
    each for the lengths 32, 128, 512, ... up to the longest.
    """

    def __init__(self, bank: PromptBank, limits: Limits):
        self.bank, self.limits = bank, limits
        with bank.computing():
            cut = row_shards()
        if limits.slots % cut:
            raise UserError(
                f"slots: found {limits.slots}; expected a multiple of the mesh's data x fsdp, {cut}; change --limit "
                "slots, or the mesh"
            )
        stored = [bank.prompt(name) for name in bank.names]
        settings = bank.backbone.settings
        self._known_ends = frozenset({settings.eos, *settings.other_eos})  # which the device looks for
        self.ends = self._known_ends | {bank.tokenizer.eos_id}
        self.padding, causal = bank.tokenizer.form.padding, bank.tokenizer.form.causal
        rows = 0 if causal else limits.max_decoder_rows
        self.decoder_rows = max([rows, *(one.layout.lengths[1] for one in stored)])
        for name in bank.names:
            self.check_prompt(name, bank.prompt(name))
        if causal:
            bank.device.share_keys(stored)
        for name in [name for name in bank.names if bank.device.takes_entry(bank.prompt(name))][:1]:
            bank.load({name})  # now the tables are there for all
        self.ring = limits.max_tokens + self.decoder_rows
        longest = limits.max_input_tokens + limits.max_prompt_rows
        learned = getattr(settings, "learned_positions", None)
        if learned is not None and longest + self.ring > learned:
            raise UserError(
                f"limits: inputs, prompt rows and answers of up to {longest + self.ring} positions; expected at most "
                f"{learned}, which this backbone has learned; set --limit max_input_tokens lower"
            )
        self.lengths = [length for length in (_SHORTEST * 4**n for n in range(12)) if length < longest] + [longest]
        attention = "decoder" if causal else "cross"
        self._before = sum(per_example.prefix_lengths(bank.device.batch([]).tables, attention))  # keys of prefixes
        self.tokens = 0  # written so far
        self._scored: set[int] = set()  # lengths for which `score_context` is compiled
        # Fewer slots of a mesh would all lie on its first devices.
        self._rows = [limits.slots] if cut > 1 else sorted({max(1, limits.slots // 8), limits.slots})
        self._wake = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]] = collections.deque()
        self._working: dict[int, tuple[Job, Answer]] = {}  # by slot
        self._draining = self._stopped = self._failed = False
        self._reset()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------------- from any thread

    def start(self) -> None:
        """Compile everything, then begin to answer."""
        with self.bank.computing():
            self._warm()
        self._thread.start()

    def check_open(self) -> None:
        """Raise RequestError: 429 if the queue is full, 503 if the server stops or its engine has failed."""
        if not self.alive:
            raise self._unavailable()
        if self.waiting >= self.limits.max_waiting:
            raise RequestError(
                429, f"server: {self.waiting} requests wait already; expected fewer; try again in a second"
            )

    def submit(self, job: Job) -> None:
        """Queue a request. Errors: RequestError as by `check_open`."""
        with self._wake:
            self.check_open()
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop working on a request whose client has left."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run a function on the bank between two steps."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            if self._stopped or self._failed:
                raise self._unavailable()
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def drain(self) -> None:
        """Accept no more requests; those in the queue are answered."""
        self._draining = True

    def stop(self) -> None:
        """Answer the requests in the queue, then end the thread."""
        with self._wake:
            self._draining = self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(self.limits.timeout_s + _STEP_S)

    @property
    def status(self) -> Literal["ok", "stopping", "failed"]:
        """Whether requests are answered, and if not, why: the server stops, or the engine has failed for good."""
        if self._failed:
            return "failed"
        return "ok" if self._thread.is_alive() and not self._draining else "stopping"

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.status == "ok"

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """How many slots are in use."""
        return len(self._working)

    def check_prompt(self, name: str, stored: HostPrompt) -> None:
        """Refuse a prompt that is too long for the compiled shapes, or has extras that they have no place for."""
        for side, found, limit, setting in (
            ("ids around a text", stored.layout.lengths[0], self.limits.max_prompt_rows, "max_prompt_rows"),
            ("rows before the decoder's input", stored.layout.lengths[1], self.decoder_rows, "max_decoder_rows"),
        ):
            if found > limit:
                raise RequestError(
                    422,
                    f"prompt {name}: {found} {side}; expected at most {limit}; start the server with more {setting}",
                )
        if not self.bank.device.has_room(stored.extras):
            raise RequestError(
                422,
                f"prompt {name}: has a prefix, an offset or factors for which this server has compiled nothing; "
                "expected prompt rows, or what those have with which it was started; start it with this one in its "
                "folder",
            )

    def warm_scores(self, name: str, ids: list[int]) -> None:
        """Compile what `score_context` runs for such a text, in a thread that nobody else waits for."""
        length = self._length_for(len(ids) + self.bank.prompt(name).layout.lengths[0])
        if length in self._scored:
            return
        with self.bank.computing():
            batch = self.bank.device.batch([""])
            fresh = jax.tree.map(
                lambda part: jnp.zeros(part.shape, part.dtype), (batch.changing, batch.tables)
            )  # not lent
            batch = dataclasses.replace(batch, changing=fresh[0], tables=fresh[1])
            jax.block_until_ready(programs.score_context(batch, np.full((1, length), self.padding, np.int32)))
        self._scored.add(length)

    def score_context(self, name: str, ids: list[int]) -> list[np.ndarray]:
        """Return what `decode.score_context` does of a text under a prompt; for `call`, decoder-only models alone."""
        self.bank.load({name})
        around, _ = side = self.bank.sides(name, ids)
        batch, first = self.bank.device.batch([name]), self.bank.device.layout(name).before.shape[1]
        tokens, _ = padded([side], 1, self._length_for(len(around)), 0, self.padding)
        found = programs.score_context(batch, tokens)
        return [np.asarray(part)[0, first : first + len(ids)] for part in found]

    # ------------------------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        while self._has_work():
            try:
                with self.bank.computing():
                    self._turn_once()
            except Exception as error:  # a defect of ours, or an error of the device
                traceback.print_exc(file=sys.stderr)
                try:  # the requests in the slots fail; those in the queue go on
                    self._fail_slots(type(error).__name__)
                except Exception:  # for example out of memory again
                    traceback.print_exc(file=sys.stderr)
                    self._fail_for_good()
                    return

    def _has_work(self) -> bool:
        """Wait until there is something to do; return whether there is, or the engine shall end."""
        with self._wake:
            while not (found := bool(self._calls or self._waiting or self._working)) and not self._stopped:
                self._wake.wait()
            return found

    def _turn_once(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # raised again where the result is awaited
                future.set_exception(error)
        self._drop_late()
        group = self._next_group()
        if group:
            self._join(group)
        if self._working:
            self._advance()

    def _drop_late(self) -> None:
        """Free the slots of requests that were cancelled or are past their deadline."""
        now = time.monotonic()
        late = RequestError(504, f"request: took longer than its {self.limits.timeout_s:g} s at most; try again later")
        with self._wake:
            waiting = [job for job in self._waiting if job.cancelled or job.deadline < now]
            for job in waiting:
                self._waiting.remove(job)
        working = {job for job, _ in self._working.values() if job.cancelled or job.deadline < now}
        for job in [*waiting, *working]:
            if not job.cancelled:
                _notify(job, late)
        self._free_slots(working)

    def _next_group(self) -> list[Job]:
        """Take requests from the queue as long as there are free slots, and room on the device for their prompts."""
        group: list[Job] = []
        wanted: dict[str, HostPrompt] = {}
        free = len(self._free)
        with self._wake:
            while self._waiting and len(group) < programs.JOINED:
                job = self._waiting[0]
                try:
                    wanted[job.prompt] = self.bank.prompt(job.prompt)
                except UserError as error:  # it was removed meanwhile
                    self._waiting.popleft()
                    _notify(job, RequestError(404, str(error)))
                    continue
                if len(job.answers) > free or not self.bank.device.fit(list(wanted.values())):
                    break
                free -= len(job.answers)
                group.append(self._waiting.popleft())
        return group

    def _join(self, group: list[Job]) -> None:
        for job in group:
            job.places = [heapq.heappop(self._free) for _ in job.answers]
            self._working |= {place: (job, answer) for place, answer in zip(job.places, job.answers, strict=True)}
        self.bank.load({job.prompt for job in group})
        sides = [self.bank.sides(job.prompt, job.ids) for job in group]
        longest = max(len(encoder) for encoder, _ in sides)
        length, size = self._length_for(longest), self.limits.slots
        count, source, place = 0, np.zeros(size, np.int32), np.zeros(size, np.int32)
        wanted = continuous_batching.nothing_wanted(size, self.ring, self.padding)
        rngs = functools.cache(self._rngs)
        for row, job in enumerate(group):
            job.length = length
            for slot, answer in zip(job.places, job.answers, strict=True):
                source[count], place[count] = row, slot
                wanted.limit[count] = answer.limit
                wanted.forced[count, : len(answer.forced)] = answer.forced
                if isinstance(how := answer.how, decode.Sampling):
                    wanted.temperature[count], wanted.rng[count] = how.temperature, rngs(how.seed)[answer.sample]
                    wanted.top_k[count], wanted.top_p[count] = how.top_k or 0, how.top_p or 1.0
                wanted.repetition_penalty[count], wanted.top[count] = answer.how.repetition_penalty, answer.top > 0
                count += 1
        texts = padded(sides, 1 if len(group) == 1 else programs.JOINED, length, self.decoder_rows, self.padding)
        self._encode(texts, [job.prompt for job in group], np.asarray(count, np.int32), source, place, wanted)

    def _length_for(self, longest: int) -> int:
        return next(length for length in self.lengths if length >= longest)

    def _encode(self, texts: tuple[np.ndarray, np.ndarray], names: list[str], *answers: Any) -> None:
        """Read texts (what encoder and decoder see) under prompts, and put their answers into slots."""
        batch = self.bank.device.batch([*names, *[""] * (len(texts[0]) - len(names))])
        self._state = programs.join_slots(batch, self._state, *texts, *answers)

    def _advance(self) -> None:
        jobs = {id(job): job for job, _ in self._working.values()}.values()
        watched = bool(self._waiting) or any(job.watched for job in jobs)
        length = max(job.length for job in jobs)
        rows = next(rows for rows in self._rows if rows > max(self._working))
        steps = np.asarray(1 if watched else _STEPS, np.int32)
        self._state, *found = self._take_steps(steps, rows, length)
        tokens, scores = map(np.asarray, found[:2])
        told = any(answer.top for _, answer in self._working.values())
        others, likeliest = map(np.asarray, found[2:]) if told else (None, None)
        changed: dict[Job, bool] = {}
        stopped = np.zeros(self.limits.slots, bool)  # of which the device knows nothing
        for place, (job, answer) in list(self._working.items()):
            written = zip(tokens[:steps, place].tolist(), scores[:steps, place].tolist(), strict=True)
            for step, (token, score) in enumerate(written):
                if token < 0:
                    break
                answer.add(token, score)
                if answer.top and others is not None and likeliest is not None:
                    best = others[step, place, : answer.top].tolist(), likeliest[step, place, : answer.top].tolist()
                    answer.others.append(dict(zip(*best, strict=True)))
                self.tokens += 1
                if answer.ended:
                    break
            if answer.done:
                stopped[place] = answer.ended and answer.tokens[-1] not in self._known_ends
                self._free_slot(place)
            changed[job] = changed.get(job, True) and answer.done
        if stopped.any():
            self._state = programs.leave_slots(self._state, stopped)
        broken = {job for job in changed if not all(math.isfinite(answer.score) for answer in job.answers)}
        self._free_slots(broken)
        for job, done in changed.items():
            if job in broken:
                _notify(job, RequestError(422, no_numbers(job.prompt)))
                continue
            if done and not any(job is other for other, _ in self._working.values()):
                _notify(job, True)
            elif job.watched:
                _notify(job, None)

    def _take_steps(self, steps: np.ndarray, rows: int, length: int) -> Any:
        return programs.advance_slots(self.bank.device.model, self._state, steps, rows, self._before + length)

    def _free_slots(self, jobs: set[Job]) -> None:
        """End requests whose answers are not done."""
        places = [place for place, (job, _) in self._working.items() if job in jobs]
        if places:
            which = np.zeros(self.limits.slots, bool)
            which[places] = True
            self._state = programs.leave_slots(self._state, which)
            for place in places:
                self._free_slot(place)

    def _free_slot(self, place: int) -> None:
        del self._working[place]
        heapq.heappush(self._free, place)

    def _fail_slots(self, reason: str) -> None:
        """Fail the requests in the slots, and begin with empty slots again."""
        for job in {job for job, _ in self._working.values()}:
            _notify(job, RequestError(500, f"server: failed ({reason}); expected none of this; see its log"))
        self._reset()

    def _fail_for_good(self) -> None:
        """Fail every request and call with 503, and accept no more."""
        with self._wake:
            self._failed = True
            jobs = {*self._waiting, *(job for job, _ in self._working.values())}
            futures = [future for _, future in self._calls]
            for left in (self._waiting, self._calls, self._working):
                left.clear()
        for job in jobs:
            _notify(job, self._unavailable())
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._unavailable())

    def _unavailable(self) -> RequestError:
        if self._failed:
            return RequestError(
                503, "server: its engine has failed; expected one that answers; restart it and see its log"
            )
        return RequestError(503, "server: is stopping; expected one that goes on; ask another")

    def _reset(self) -> None:
        self._working.clear()
        self._free = list(range(self.limits.slots))
        self._state: Any = None  # frees the old state before the new one is made
        with self.bank.computing():
            batch = self.bank.device.batch([""])
            self._state = programs.empty_slots(batch, self.limits.slots, self.ring, self.lengths[-1])

    def _warm(self) -> None:
        size = self.limits.slots
        none, places = np.asarray(0, np.int32), np.zeros(size, np.int32)
        wanted = continuous_batching.nothing_wanted(size, self.ring, self.padding)
        for length, count in ((length, count) for length in self.lengths for count in (1, programs.JOINED)):
            self._encode(padded([], count, length, self.decoder_rows, self.padding), [], none, places, places, wanted)
        for length, rows in ((length, rows) for length in self.lengths for rows in self._rows):
            self._state, *_ = self._take_steps(none, rows, length)
        self._state = programs.leave_slots(self._state, np.zeros(size, bool))
        self._rngs(0)
        for name in self.bank.names[:1]:
            self.bank.load({name})

    def _rngs(self, seed: int) -> np.ndarray:
        """Return the keys of the samples of one text: those of `decode.answers` for the text number 0."""
        split = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), self.limits.slots)
        return np.asarray(jax.random.key_data(split))


def _notify(job: Job, event: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the client's event loop has closed
        job.notify(event)
