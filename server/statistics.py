"""Before the first round: sites pool counts of classes and statistics of normalisations.

What a site sends is about all its training slices together: pixels by class, and for each
channel of each normalisation a mean and a variance. Nothing is added to these numbers to hide
single persons, and they go to the server as they are; a site's own settings may withhold them.

Normalisations are asked for one after the other, because a layer's inputs are known only when
all in front of it have their new statistics; ``core/batch_statistics.py`` says what happens
otherwise. The result is on disk before the first round and is not asked for again; a run that
is stopped earlier asks from the start and gets the same bits.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid

from dafne_federated.core.class_weights import pool_counts
from dafne_federated.core.errors import RunError
from dafne_federated.core.model_file import Weights, parse_model
from dafne_federated.core.moments import pool_moments
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.pooled_statistics import (
    PooledMoments,
    PooledSite,
    PooledStatistics,
    pooled_state,
)
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.state import State
from dafne_federated.core.wire import (
    EVALUATE_STATE,
    QUERY_STATISTICS,
    RoundRequest,
    StatisticsRequest,
    array_record,
    record_bytes,
)
from dafne_federated.server.exchange import Replies, exchange
from dafne_federated.server.membership import Members
from dafne_federated.strategies.statistics_gate import (
    Answer,
    capped_counts,
    capped_moments,
    far_counts,
    far_moments,
    judge_statistics,
    other_grids,
)
from dafne_federated.strategies.update_gate import judge

log = logging.getLogger(__name__)

_GROUP = "0"  # Flower's group: what comes before the first round


def pool_statistics(
    grid: Grid, folder: RunFolder, members: Members, first: State
) -> PooledStatistics:
    """Return what the sites pooled, now or before the run was stopped.

    Where statistics of normalisations are pooled, the sites first measure the base as it is,
    so that the release is compared with it and not with the base that was mended here.

    Args:
        grid: Flower's connection to the sites.
        folder: The run.
        members: The sites; what is sent here is added to their bytes.
        first: The state that changes nothing.

    Raises:
        RunError: No site shares its statistics, or too few sites answer as they should.
    """
    kept = folder.pooled()
    info, plan = folder.info(), folder.plan()
    if kept is not None or not (plan.normalisations or info.settings.class_weights == "pooled"):
        return kept or PooledStatistics()
    pool = _Pool(grid, folder, info, plan, members, dict.fromkeys(members.nodes, PooledSite()))
    if plan.normalisations:
        pool.evaluate_base(first)
    pixels: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    if info.settings.class_weights == "pooled":
        answers = pool.ask("classes", 0, {})
        counts = pool_counts(capped_counts(answers))
        pixels, slices = counts.pixels, counts.slices
    found: list[PooledMoments] = []
    base = parse_model(folder.base_bytes()).weights if plan.normalisations else {}
    for number in range(len(plan.normalisations)):
        answers = pool.ask("moments", number, pooled_state(plan, base, found))
        together = pool_moments(capped_moments([a.moments for a in answers if a.moments]))
        found.append(
            PooledMoments(
                slices=together.count,
                mean=together.mean.tolist(),
                variance=together.variance.tolist(),
            )
        )
    result = PooledStatistics(
        sites=pool.sites, moments=found, class_pixels=list(pixels), class_slices=list(slices)
    )
    folder.keep_pooled(result)
    folder.event("statistics pooled", sites={n: s.status for n, s in result.sites.items()})
    return result


def with_statistics(folder: RunFolder, state: State, pooled: PooledStatistics) -> State:
    """Return ``state`` with the pooled statistics of normalisations, if there are any."""
    if not pooled.moments:
        return state
    base: Weights = parse_model(folder.base_bytes()).weights
    return state | pooled_state(folder.plan(), base, pooled.moments)


@dataclass
class _Pool:
    """The exchanges of one run; ``sites`` says how each of them fared so far."""

    grid: Grid
    folder: RunFolder
    info: RunInfo
    plan: AdaptationPlan
    members: Members
    sites: dict[str, PooledSite] = field(default_factory=dict)

    def evaluate_base(self, first: State) -> None:
        """Let all sites measure the base as it is."""
        request = RoundRequest(
            run=self.info.run,
            round=1,
            base_digest=self.info.base_digest,
            plan_digest=self.info.plan_digest,
            epochs=0,
            batch_size=self.info.settings.batch_size,
            learning_rate=self.info.settings.learning_rate,
            seed=self.info.settings.seed,
        )
        replies = self._exchange(request.to_record(array_record(first)), EVALUATE_STATE)
        for site in sorted(self.sites):
            answer = _unanswered(site, replies, self.info.settings.deadline)
            if answer is None:
                content = replies[site]
                assert content is not None  # else it is unanswered
                verdict = judge(site, content, request, self.plan, self.members.cases[site])
                answer = Answer("shared" if verdict.status == "ok" else verdict.status)
                answer = Answer(answer.status, verdict.reason)
                if verdict.status == "ok" and (reply := verdict.reply):
                    measured = zip(self.plan.labels, reply.dice, reply.dice_cases, strict=False)
                    dice = {label: value if n else None for label, value, n in measured}
                    self.sites[site] = PooledSite(status="shared", dice=dice)
            self._note(site, answer)
        self._require_enough()

    def ask(self, what: str, number: int, arrays: State) -> list[Answer]:
        """Return the answers that can be pooled, in the order of the sites' names."""
        request = StatisticsRequest.model_validate(
            {
                "run": self.info.run,
                "base_digest": self.info.base_digest,
                "plan_digest": self.info.plan_digest,
                "what": what,
                "number": number,
            }
        )
        replies = self._exchange(request.to_record(array_record(arrays)), QUERY_STATISTICS)
        deadline, answers = self.info.settings.deadline, {}
        for site in self._asked():
            content = replies.get(site)
            answers[site] = _unanswered(site, replies, deadline) or judge_statistics(
                site, content or RecordDict({}), request, self.plan, self.members.cases[site]
            )
            before = self.sites[site].slices
            if answers[site].status == "shared" and before not in (0, answers[site].slices):
                reason = f"training slices: expected {before} as before, got {answers[site].slices}"
                answers[site] = Answer("refused", reason)
        odd = other_grids(answers)
        kept = {site: answer for site, answer in answers.items() if site not in odd}
        for site, reason in (odd | far_counts(kept) | far_moments(answers)).items():
            answers[site] = Answer("refused", reason)
        for site, answer in answers.items():
            self._note(site, answer)
        self._require_enough()
        return [answer for _, answer in sorted(answers.items()) if answer.status == "shared"]

    def _asked(self) -> list[str]:
        return [name for name, site in sorted(self.sites.items()) if site.status == "shared"]

    def _exchange(self, content: RecordDict, message_type: str) -> Replies:
        nodes = {name: self.members.nodes[name] for name in self._asked()}
        replies = exchange(
            self.grid, dict.fromkeys(nodes, content), nodes, message_type, _GROUP,
            self.info.settings.deadline, lambda _, content: content,
            retries=self.info.settings.retries,
        )  # fmt: skip
        for name in nodes:
            self.members.bytes_down[name] += record_bytes(content)
            answer = replies.get(name)
            self.members.bytes_up[name] += record_bytes(answer) if answer else 0
        return replies

    def _note(self, site: str, answer: Answer) -> None:
        changes: dict[str, object] = {"status": answer.status, "reason": answer.reason}
        if answer.slices:
            changes["slices"] = answer.slices
        self.sites[site] = self.sites[site].model_copy(update=changes)
        if answer.status != "shared":
            log.warning("statistics: %s: %s: %s", site, answer.status, answer.reason)
            self.folder.event("not pooled", site=site, reason=answer.reason)

    def _require_enough(self) -> None:
        reasons = "; ".join(f"{n}: {s.reason}" for n, s in sorted(self.sites.items()) if s.reason)
        useful = [site for site in self.sites.values() if site.status in ("shared", "withheld")]
        least = self.info.settings.min_sites
        if len(useful) < least:
            msg = f"statistics: expected {least} sites that answer, got {len(useful)}; {reasons}"
            raise RunError(msg)
        if not self._asked():
            msg = f"statistics: expected a site that shares its own, got none; {reasons}"
            raise RunError(f"{msg}; take statistics 'base' and class-weights 'case'")


def _unanswered(site: str, replies: Mapping[str, RecordDict | None], wait: float) -> Answer | None:
    if site not in replies:
        return Answer("silent", f"no answer within {wait:g} s")
    if replies[site] is None:
        return Answer("failed", "its program ended without an answer")
    return None
