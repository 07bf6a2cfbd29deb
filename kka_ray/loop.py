"""The KKA loop: describe, render, judge, keep, prefer, and again.

Every stage's output is in the store, so a loop that was interrupted goes on where it was, and two loops share what
they have in common.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kka_ray import assets, versions
from kka_ray.amounts import amount
from kka_ray.cluster import train
from kka_ray.cluster.fits import fit_worker
from kka_ray.cluster.streaming import EDITED, Drawn, Pools, Progress, Streamer
from kka_ray.config.models import ApiSampler, ConfusionConfig, LoopConfig, RunConfig, share_of
from kka_ray.confusion import judge as judging
from kka_ray.confusion import selection
from kka_ray.confusion.selection import KeptImage
from kka_ray.describe import drift, prompts
from kka_ray.describe.guard import Guard
from kka_ray.errors import ConfigError, StageError
from kka_ray.features.base import Features
from kka_ray.features.text import TextEncoder
from kka_ray.preference import dpo, pairs
from kka_ray.prepare import Prepared
from kka_ray.records import Description, PreferencePair, Prompt, Verdict, from_table, to_table
from kka_ray.store import Attempt, Output, Store, stage_key


@dataclass(frozen=True)
class Round:
    """One round's records and measures."""

    number: int
    descriptions: list[Description]
    drawn: Drawn
    kept: list[KeptImage]
    status: str
    """`ok`, or `stalled: ...` where DPO was left out before this round."""
    dpo: dict[str, Any] | None
    diversity: float
    distinct_2: float
    unique_share: float
    perplexity: float | None
    """None where the sampler is an API that gives no log-probabilities of what is there already."""
    seconds: dict[str, float]
    diagnostics: dict[str, float]
    usage: dict[str, int] = field(default_factory=dict)
    """What was asked of an API: requests, retries, prompt_tokens, completion_tokens; empty for a model of our own."""
    unscored: int = 0
    """Lines that `perplexity` leaves out, as they could not be scored."""


class _NotAllScored(Exception):
    """Measures that are not to be kept under the key of all lines: the next run may score those that are left out."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found


@dataclass
class LoopResult:
    """All rounds, the auditor's verdicts over them, and the outputs that hold it all."""

    prompts: list[Prompt]
    rounds: list[Round] = field(default_factory=list)
    audit: judging.JudgeResult | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """The last verdict on each drawn image, by id."""
    adapter: str | None = None
    """Key of the last adapter in stage `dpo`."""
    normals: Drawn = field(default_factory=Drawn)
    """Normal captions that were drawn: the control of artefacts."""

    def features(self, ids: list[str]) -> Features:
        """Features of drawn images by id, in that order."""
        where = {id_: (r.drawn, i) for r in self.rounds for i, id_ in enumerate(r.drawn.ids)}
        return Features.join([where[id_][0].features.take([where[id_][1]]) for id_ in ids])

    def images(self, ids: list[str]) -> list[np.ndarray]:
        """Drawn images by id, in that order."""
        wanted = set(ids)
        image: dict[str, np.ndarray] = {}
        for r in self.rounds:
            own = [id_ for id_ in r.drawn.ids if id_ in wanted]
            image |= zip(own, r.drawn.images(own), strict=True)
        return [image[id_] for id_ in ids]


def budget(config: LoopConfig, normals: int) -> int:
    """Images that are kept of so many normals (training and validation): the share of them, or the least number."""
    return max(share_of(config.budget, normals), config.min_budget)


class Loop:
    """One run of the method on prepared normals. The pools outlive its rounds."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        prepared: Prepared,
        progress: Progress,
        pools: Pools,
        withheld: Callable[[Description], bool] | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        """`withheld` says whose images never enter the kept set; nothing else of the loop depends on it.

        `ahead`: Train jobs are started while what they are to do is still being drawn and judged. Whoever made the
        pools closes them. Raises ConfigError if the budget is no image.
        """
        self.budget = budget(config.loop, prepared.count)
        if not self.budget:
            raise ConfigError(
                f"loop.budget: {config.loop.budget:g} of {amount(prepared.count, 'normal')} is less than one image to "
                "keep; raise it, or set loop.min_budget"
            )
        self.config, self.store, self.prepared, self.progress = config, store, prepared, progress
        self.withheld = withheld
        self._withheld_ids: set[str] = set()
        self.encoder = TextEncoder()
        self.guard = Guard(
            config.describe.guard, prepared.data.normal_terms, prepared.normals.train.captions, self.encoder
        )
        self.streamer = Streamer(config, store, prepared, self.guard, pools)
        self._pools = pools
        self._starts_ahead = ahead and config.cluster.mode == "disjoint"
        self._ahead: train.Ahead | None = None

    def run(self) -> LoopResult:
        """All rounds and the audit."""
        config = self.config
        result = LoopResult(self._prompts())
        status, training = "ok", None
        self.streamer.submit_normals()
        for number in range(config.loop.rounds + 1):
            started = time.perf_counter()
            if number:
                result.adapter, status, training = self._prefer(result, number)
                self.close()  # the round was stalled, or its adapter found
            preferred = time.perf_counter()
            descriptions, drawn, measures = self._describe_and_render(result, number)
            rendered = time.perf_counter()
            usage = dict(drawn.usage + Counter(measures.pop("usage")))
            self.progress("judge", number, 0, len(drawn.ids))
            judged = self._judge(result, drawn, descriptions)
            self.progress("judge", number, len(drawn.ids), len(drawn.ids))
            result.verdicts = {v.id: v for v in judged.verdicts}
            kept = self._keep(result, drawn, descriptions, number)
            seconds = {
                "prefer": preferred - started,
                "describe_and_render": rendered - preferred,
                "judge": time.perf_counter() - rendered,
            }
            seconds = {k: round(v, 2) for k, v in seconds.items()}
            result.rounds.append(
                Round(
                    number,
                    descriptions,
                    drawn,
                    kept,
                    status,
                    training,
                    **measures,
                    seconds=seconds,
                    diagnostics=judged.diagnostics,
                    usage=usage,
                )
            )
            self.progress("round", number, number + 1, config.loop.rounds + 1)
        count = sum(len(r.drawn.ids) for r in result.rounds)
        self.progress("audit", -1, 0, count)
        result.audit = self._audit(result)
        self.progress("audit", -1, count, count)
        return result

    def take_ahead(self) -> train.Ahead | None:
        """The job that was started ahead, if any: the caller has to tell it what to do."""
        job, self._ahead = self._ahead, None
        return job

    def close(self) -> None:
        """Ends a job that was started ahead and is not needed."""
        job = self.take_ahead()
        if job:
            job.cancel()

    def _start_ahead(self, number: int) -> None:
        """Starts the job that follows a round: DPO, or after the last one the fits."""
        config = self.config
        if not self._starts_ahead:
            return
        self._pools.let_dpo_in()
        if number < config.loop.rounds:
            modules, workers = ["kka_ray.preference.dpo"], config.preference.workers
            self._ahead = train.Ahead("dpo", train.dpo_worker, workers, config.cluster, imports=modules)
        else:
            workers = config.detect.workers
            self._ahead = train.Ahead("detect", fit_worker, workers, config.cluster, gpus=False)

    # --- the stages, in the order of the method ---

    def _prompts(self) -> list[Prompt]:
        config, prepared = self.config, self.prepared
        inputs = {
            "normals": prepared.identity,
            "subject": prepared.data.subject,
            "config": config.describe.model_dump(
                mode="json", include={"prompts", "examples", "instruction", "contrast"}
            ),
            "seed": config.seed,
            "versions": versions.computing(),
        }

        def make(attempt: Attempt) -> None:
            built = prompts.build_prompts(
                prepared.normals.train, prepared.train.pooled, prepared.data.subject, config.describe, config.seed
            )
            attempt.table(to_table(Prompt, built))

        output = self.store.get_or_make("prompts", prompts.VERSION, inputs, make)
        return from_table(Prompt, output.table())

    def _describe_and_render(self, result: LoopResult, number: int) -> tuple[list[Description], Drawn, dict[str, Any]]:
        """A round's lines and images, and how varied its lines are."""
        seed = self.config.seed * 1000 + number
        measures: dict[str, Any] = {}
        descriptions, drawn = self.streamer.run(
            result.prompts,
            number,
            seed,
            result.adapter,
            self.progress,
            lambda raw: measures.update(self._drift(result, raw)),
        )
        result.normals = self.streamer.normals
        check_drawn(descriptions, drawn, number)
        return descriptions, drawn, measures

    def _drift(self, result: LoopResult, raw: list[tuple[str, str]]) -> dict[str, Any]:
        """Diversity and perplexity of the raw lines, before any is refused; perplexity under the untuned model."""
        text_of = {p.id: p.text for p in result.prompts}
        sampler = self.config.describe.sampler
        measured = not isinstance(sampler, ApiSampler) or sampler.echo
        asked, lines = [text_of[prompt_id] for prompt_id, _ in raw], [line for _, line in raw]
        key_inputs = {"lines": _digest([asked, lines]), "perplexity": measured, **self.streamer.sampler_inputs()}

        def make(attempt: Attempt) -> None:
            self._start_ahead(len(result.rounds))  # a round that is found in the store is soon followed by the next
            log_probs, usage, unscored = self.streamer.log_probs(asked, lines) if measured else (None, {}, 0)
            stripped = [line.strip() for line in lines]
            found = {
                "diversity": drift.diversity(self.encoder.embed(stripped)),
                "distinct_2": drift.distinct_2(stripped),
                "unique_share": drift.unique_share(stripped),
                "perplexity": None if log_probs is None else drift.perplexity(log_probs),
                "usage": usage,
                "unscored": unscored,
            }
            if unscored:
                raise _NotAllScored(found)
            attempt.json(found, "drift")

        try:
            return dict(self.store.get_or_make("drift", drift.VERSION, key_inputs, make).json("drift"))
        except _NotAllScored as partial:
            return partial.found

    def _judge(self, result: LoopResult, drawn: Drawn, descriptions: list[Description]) -> judging.JudgeResult:
        """Cross-fitted verdicts on all images drawn so far."""
        return self._cross_fit(self.config.confusion, [r.drawn for r in result.rounds] + [drawn], result, descriptions)

    def _audit(self, result: LoopResult) -> judging.JudgeResult:
        """Verdicts on all rounds by one auditor with one band, so that rounds can be compared.

        Those of the rounds come from evaluators that saw different images. The rule is `band` whatever the
        configuration says, as the paper's rule calls a fixed number of images easy; where it is, the auditor is the
        last round's evaluator.
        """
        config = self.config.confusion.model_copy(update={"rule": "band"})
        return self._cross_fit(config, [r.drawn for r in result.rounds], result, [])

    def _cross_fit(
        self,
        confusion: ConfusionConfig,
        drawn: list[Drawn],
        result: LoopResult,
        newest: list[Description],
    ) -> judging.JudgeResult:
        seed, prepared = self.config.seed, self.prepared
        text_of = {d.id: d.text for r in result.rounds for d in r.descriptions} | {d.id: d.text for d in newest}
        ids = [id_ for d in drawn for id_ in d.ids]
        rounds = [int(id_[1:].split("-")[0]) for id_ in ids]
        parts = [d.features for d in drawn if len(d.ids)]
        features = Features.join(parts) if parts else prepared.train.take([])
        train = judging.rows(confusion, prepared.train)
        if self.config.render.mode == "img2img":
            train = np.delete(train, EDITED, axis=0)
        validation = judging.rows(confusion, prepared.validation)
        if confusion.drawn_normals and len(result.normals.ids) >= 4:
            own = judging.rows(confusion, result.normals.features)
            train, validation = judging.with_drawn_normals(train, validation, own)
        judged = judging.rows(confusion, features)
        texts = [text_of[id_] for id_ in ids]
        inputs = {
            "drawn": _digest([ids, rounds, texts]),
            "arrays": [hashlib.sha256(np.ascontiguousarray(x).data).hexdigest() for x in (judged, train, validation)],
            "config": confusion.model_dump(mode="json"),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "versions": versions.computing(),
        }

        def make(attempt: Attempt) -> None:
            found = judging.judge(ids, rounds, judged, texts, train, validation, confusion, seed)
            judging.write_result(attempt, found)

        return judging.read_result(self.store.get_or_make("judge", judging.VERSION, inputs, make))

    def _keep(self, result: LoopResult, drawn: Drawn, descriptions: list[Description], number: int) -> list[KeptImage]:
        loop = self.config.loop
        if self.withheld:
            self._withheld_ids |= {d.id for d in descriptions if self.withheld(d)}
        if number == 0:
            size = selection.target_size(loop.mode, self.budget, loop.rounds, 0)
            ids = [id_ for id_ in drawn.ids if id_ not in self._withheld_ids]
            return selection.zeroth(ids, size, self.config.seed)
        kept = result.rounds[-1].kept
        verdicts = [v for v in result.verdicts.values() if v.id not in self._withheld_ids]
        return selection.update(
            kept, verdicts, loop.mode, self.budget, rounds=loop.rounds, round=number, seed=self.config.seed
        )

    def _prefer(self, result: LoopResult, number: int) -> tuple[str | None, str, dict[str, Any] | None]:
        """The next adapter, or the present one and the reason why the round is stalled."""
        config = self.config.preference
        lines = [d for r in result.rounds for d in r.descriptions]
        # A verdict on an image that does not show its text says nothing of the text.
        mismatched = {id_ for r in result.rounds for id_ in r.drawn.mismatched}
        lines = [d for d in lines if d.id not in mismatched]
        verdicts = [v for v in result.verdicts.values() if v.id not in mismatched]
        built = pairs.build_pairs(result.prompts, lines, verdicts, config, self.config.seed * 1000 + number)
        if len(built) < config.min_pairs:
            reason = f"stalled: {amount(len(built), 'pair')}, fewer than min_pairs = {config.min_pairs}"
            collapsed = int(result.rounds[-1].diagnostics.get("collapsed_folds", 0))
            if collapsed:
                reason += (
                    f"; the evaluator collapsed in {amount(collapsed, 'fold')} of round {result.rounds[-1].number}"
                )
            return result.adapter, reason, None
        output = self._train(built, result.adapter, number)
        self.progress("prefer", number, 1, 1)
        return output.key, "ok", output.json("result")

    def _train(self, built: list[PreferencePair], previous: str | None, number: int) -> Output:
        table = to_table(PreferencePair, built)
        pairs_output = self.store.get_or_make(
            "pairs", pairs.VERSION, {"pairs": _digest(table.to_pylist())}, lambda a: a.table(table)
        )
        sampler = self.config.describe.sampler
        assert not isinstance(sampler, ApiSampler), "a configuration with an API and DPO is refused as it is read"
        inputs = {
            "pairs": pairs_output.key,
            "previous": previous,
            "model": assets.resolve(sampler.model).identity,
            "config": self.config.preference.training(),
            "seed": self.config.seed * 1000 + number,
            "threads": self.config.cluster.train_threads,
            "device": train.computes_on(self.config.cluster),
            "versions": versions.computing(self.config.cluster.train_runtime_env.pip),
        }
        key = stage_key("dpo", dpo.VERSION, inputs)
        with self.store.lease("dpo", key):
            if self.store.find("dpo", key) is None:
                self.progress("prefer", number, 0, 1)
                arguments = {
                    "store": self.store.uri,
                    "pairs": pairs_output.key,
                    "previous": previous,
                    "model": sampler.model,
                    "config": self.config.preference,
                    "seed": inputs["seed"],
                    "inputs": inputs,
                    "trust_remote_code": sampler.trust_remote_code,
                    "cluster": self.config.cluster,
                }
                self.streamer.rest_samplers()
                self._pools.let_dpo_in()
                workers = self.config.preference.workers
                train.run("dpo", train.dpo_worker, arguments, workers, self.config.cluster, ahead=self.take_ahead())
        return self.store.reported("dpo", key)


def check_drawn(descriptions: list[Description], drawn: Drawn, number: int) -> None:
    """Raises StageError if the zero-th round has no line that can be drawn, or any round no image that was."""
    usable = sum(d.status == "ok" for d in descriptions)
    if usable and not drawn.ids:
        first = next(r.error for r in drawn.renderings if r.status == "failed")
        raise StageError(
            f"round {number}: of {amount(len(drawn.renderings), 'image')} none could be drawn; the first: {first}"
        )
    if not usable and number == 0:
        counts = Counter(d.reason for d in descriptions).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        raise StageError(
            f"the language model wrote {amount(len(descriptions), 'line')}, of which none can be drawn ({reasons}); "
            f"the first: {descriptions[0].raw.strip()[:80]!r}. Change describe.instruction or describe.guard, or "
            "another model"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
