"""How a site answers: it acts, and whatever goes wrong gives nothing away.

The answer holds a status and plain words of ours: texts of exceptions, paths and names never leave.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Context, Message, RecordDict

from dafne_federated.client.consent import Consent
from dafne_federated.client.site_settings import REFUSED, SiteSettings, site_of
from dafne_federated.core.errors import ApprovalError, MessageError, StateError
from dafne_federated.core.wire import plain

if TYPE_CHECKING:
    from dafne_federated.client.site import Site

log = logging.getLogger(__name__)

FAILED = "the site could not do this; its own log says why"
Part = TypeVar("Part", bound=Consent)  # of a site that a message needs


def working_site(settings: SiteSettings) -> "Site":
    """Return the site with all that it can do; loads TensorFlow."""
    from dafne_federated.client.site import Site

    return Site(settings)


def answer(
    message: Message,
    context: Context,
    act: Callable[[Part], RecordDict],
    respond: Callable[[SiteSettings, str, str], RecordDict],
    part: Callable[[SiteSettings], Part],
    first: Callable[[], None] | None = None,
) -> Message:
    """Let the site act; turn whatever goes wrong into an answer that gives nothing away.

    Where not even the site's own settings or the message can be read, the answer is empty.

    Args:
        message: What came.
        context: Flower's; it says where the site's settings are.
        act: Gives the answer's content.
        respond: Gives that of an answer with a status and a reason.
        part: Makes what ``act`` needs of the site, the whole or its consent alone.
        first: Called before, to refuse by an error.
    """
    content = RecordDict({})
    try:
        settings = site_of(context)
        content = respond(settings, "failed", FAILED)
        if reason := context.node_config.get(REFUSED):
            raise ApprovalError(str(reason))
        if first is not None:
            first()
        content = act(part(settings))
    except (ApprovalError, MessageError, StateError) as error:  # our own words, no names in them
        log.warning("refused: %s", error)
        content = respond(settings, "refused", plain(error)) if content else content
    except Exception:  # nothing of it may leave the site
        log.exception("the site failed")
    return Message(content, reply_to=message)
