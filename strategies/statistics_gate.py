"""Turn a site's answer about its slices into what can be pooled, or into a reason why not."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from flwr.app import RecordDict

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.errors import DafneFederatedError, StateError
from dafne_federated.core.moments import Moments
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.wire import StatisticsReply, StatisticsRequest, plain
from dafne_federated.core.wire_arrays import take_arrays

log = logging.getLogger(__name__)

# More slices than this are not believed of one examination.
_SLICES_OF_A_CASE = 2000
# What float32 can still hold the square of.
_LARGEST_MEAN = 1e18
_LARGEST_VARIANCE = 1e36
# Honest sites were at most 2.5 spreads apart, their means at most 0.54: all 19 normalisations of
# small networks trained here, on cervical cords of three centres (three scanners), on lumbar spines
# dealt unevenly to four sites, and on hippocampi by how their intensities were stored. Four times
# that is not believed.
_FARTHEST = 10
# The share of a label in the slices that hold it was 0.75 to 1.25 times the median of the sites in
# the same data. A field of view that is three times as large in both directions makes a factor 9.
_UNEVEN = 10


@dataclass(frozen=True)
class Answer:
    """What became of one answer.

    Attributes:
        status: ``shared``, ``withheld``, ``refused`` (here or by the site) or ``failed``.
        reason: In words; empty if shared.
        slices: Training slices of the site.
        classes: Their counts, if those were asked for.
        moments: Their moments, if those were asked for; counted in slices.
    """

    status: Literal["shared", "withheld", "refused", "failed", "silent"]
    reason: str = ""
    slices: int = 0
    classes: ClassCounts | None = None
    moments: Moments | None = None


def judge_statistics(
    site: str, content: RecordDict, request: StatisticsRequest, plan: AdaptationPlan, max_cases: int
) -> Answer:
    """Check one answer; nothing about it is trusted, and a bad one costs the pool nothing.

    Checked: that it answers this question of this run and comes from this site; that numbers of
    slices and pixels are plausible and fit each other; names, shapes, dtypes and byte counts of
    arrays before any of them is parsed; that moments are finite, of a size that float32 holds,
    and no variance is negative.

    Args:
        site: Registered name of the site that the transport says it comes from.
        content: The answer.
        request: What was asked.
        plan: The plan of the run.
        max_cases: Training cases that the site offered.
    """
    try:
        reply = StatisticsReply.from_record(content)
        if reply.status != "ok":
            return Answer(reply.status, reply.reason or reply.status)
        for name, wanted, got in (
            ("site", site, reply.site),
            ("run", request.run, reply.run),
            ("base digest", request.base_digest, reply.base_digest),
            ("plan digest", request.plan_digest, reply.plan_digest),
            ("question", f"{request.what} {request.number}", f"{reply.what} {reply.number}"),
        ):
            if wanted != got:
                msg = f"{name}: expected {str(wanted)[:20]!r}, got {str(got)[:20]!r}"
                raise StateError(msg)
        if not 0 < reply.slices <= max_cases * _SLICES_OF_A_CASE:
            most = max_cases * _SLICES_OF_A_CASE
            msg = f"training slices: expected 1 to {most}, got {reply.slices}"
            raise StateError(msg)
        if request.what == "classes":
            return Answer("shared", slices=reply.slices, classes=_classes(reply, plan))
        found = _moments(content, reply.slices, plan, request.number)
        return Answer("shared", slices=reply.slices, moments=found)
    except DafneFederatedError as error:
        return Answer("refused", plain(error))
    except Exception:  # what a site sends must never end the run
        log.exception("an answer of %s cannot be read", site)
        return Answer("refused", "its answer cannot be read")


def other_grids(answers: Mapping[str, Answer]) -> dict[str, str]:
    """Return the reason by site for counts that are of slices of another size than most.

    All sites prepare slices on the grid of one network, so pixels of a slice are equal.
    """
    sizes = {
        site: sum(answer.classes.pixels) // answer.slices
        for site, answer in sorted(answers.items())
        if answer.classes
    }
    if not sizes:
        return {}
    usual = max(sizes.values(), key=lambda size: (list(sizes.values()).count(size), -size))
    return {
        site: f"pixels of a slice: expected {usual} as at most sites, got {size}"
        for site, size in sizes.items()
        if size != usual
    }


def far_moments(answers: Mapping[str, Answer]) -> dict[str, str]:
    """Return the reason by site for moments that are far from those of most sites.

    Compared are the means with their median, and the variances with 0, in units of the usual
    spread of the layer: the standard deviation and the spread of the means, each as the median
    of the sites. With fewer than three answers there is no majority, and nothing is refused.
    """
    found = {site: a.moments for site, a in sorted(answers.items()) if a.moments}
    if len(found) < 3:
        return {}
    means = np.stack([part.mean for part in found.values()])
    middle = np.median(means, axis=0)
    variance = np.median([part.variance for part in found.values()], axis=0).mean()
    usual = float(np.sqrt(variance) + np.median(np.abs(means - middle), axis=0).mean())
    reasons = {}
    for site, part in found.items():
        away = np.abs(part.mean - middle).max()
        far = max(float(away), float(np.sqrt(part.variance.max())))
        if far > _FARTHEST * usual > 0:
            reasons[site] = (
                f"its statistics are far from those of most sites: expected means and deviations "
                f"within {_FARTHEST * usual:.3g}, got {far:.3g}"
            )
    return reasons


def far_counts(answers: Mapping[str, Answer]) -> dict[str, str]:
    """Return the reason by site for counts in which a label is far larger or smaller than usual.

    Compared is the share of each channel in the slices that hold it, which is what weights are
    made of, with the median of the sites that have it. With fewer than three of these there is no
    majority, and nothing is refused.
    """
    found = {site: a.classes for site, a in sorted(answers.items()) if a.classes}
    shares = {site: counts.frequencies(1) for site, counts in found.items()}
    reasons: dict[str, str] = {}
    for channel in range(min((len(share) for share in shares.values()), default=0)):
        own = {site: share[channel] for site, share in shares.items() if share[channel] > 0}
        usual = float(np.median(list(own.values()))) if own else 0.0
        for site, share in own.items():
            if len(own) >= 3 and not usual / _UNEVEN <= share <= usual * _UNEVEN:
                reasons[site] = (
                    f"counts: channel {channel} has {share:.3g} pixels in a slice that holds it, "
                    f"expected {usual / _UNEVEN:.3g} to {usual * _UNEVEN:.3g} as at most sites"
                )
    return reasons


def capped_counts(answers: Sequence[Answer]) -> list[ClassCounts]:
    """Return the counts of answers, from three on none of more slices than all others together.

    Pixels go down with the slices, so the share of a label in them stays.
    """
    given = [(answer.slices, answer.classes) for answer in answers if answer.classes]
    total = sum(slices for slices, _ in given)
    result = []
    for slices, counts in given:
        most = min(slices, total - slices) if len(given) > 2 else slices
        fewer = [-(-n * most // slices) for n in counts.slices]
        pixels = [
            p * m // max(n, 1) for p, n, m in zip(counts.pixels, counts.slices, fewer, strict=True)
        ]
        result.append(ClassCounts(tuple(pixels), tuple(fewer)))
    return result


def capped_moments(parts: Sequence[Moments]) -> list[Moments]:
    """Return the moments, from three on none counting more than all others together."""
    total = sum(part.count for part in parts)
    if len(parts) < 3:
        return list(parts)
    return [replace(part, count=min(part.count, total - part.count)) for part in parts]


def _classes(reply: StatisticsReply, plan: AdaptationPlan) -> ClassCounts:
    channels, size = len(plan.labels) + 1, sum(reply.class_pixels) // reply.slices
    lengths = (len(reply.class_pixels), len(reply.class_slices))
    if lengths != (channels, channels):
        msg = f"counts: expected pixels and slices of {channels} channels, got {lengths}"
        raise StateError(msg)
    if size == 0 or sum(reply.class_pixels) != size * reply.slices:
        got = f"{sum(reply.class_pixels)} pixels in {reply.slices} slices"
        msg = f"counts: expected slices of one size with a channel for each pixel, got {got}"
        raise StateError(msg)
    for channel, (pixels, slices) in enumerate(
        zip(reply.class_pixels, reply.class_slices, strict=True)
    ):
        if not slices <= pixels <= slices * size or slices > reply.slices:
            got = f"{pixels} pixels in {slices} slices"
            msg = f"counts: channel {channel} cannot have {got} of {reply.slices}"
            raise StateError(msg)
    return ClassCounts(tuple(reply.class_pixels), tuple(reply.class_slices))


def _moments(content: RecordDict, slices: int, plan: AdaptationPlan, number: int) -> Moments:
    shape = plan.normalisations[number][0].shape
    arrays = take_arrays(content, {"mean": shape, "variance": shape}, "float64")
    mean, variance = arrays["mean"], arrays["variance"]
    if (variance < 0).any():
        msg = f"variance: expected values of at least 0, got {variance.min():.3g}"
        raise StateError(msg)
    if np.abs(mean).max() > _LARGEST_MEAN or variance.max() > _LARGEST_VARIANCE:
        got = f"{np.abs(mean).max():.3g} and {variance.max():.3g}"
        msg = f"expected means and variances that float32 can hold, got up to {got}"
        raise StateError(msg)
    return Moments(slices, mean, variance)
