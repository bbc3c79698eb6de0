"""Reports conversations of our agents that began without a pass: nobody checked their user, no limit counts them."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

from voicepass.settlement.reports import Report
from voicepass.telemetry.logger import Logger

OPEN_METHODS: Final = frozenset({"public", "shareable_link"})
"""ElevenLabs' authorization methods with which anyone can begin a conversation."""
NOT_ISSUED: Final = "not_issued"
"""ElevenLabs lists a conversation that is not in the ledger."""

_MAX_REMEMBERED: Final = 10_000

_log = Logger("voicepass.settlement")


class Bypasses:
    """Logs and counts each bypass once for each process. `count` gets the reason."""

    def __init__(self, *, agent_ids: Collection[str], count: Callable[[str], None]) -> None:
        self._agent_ids = agent_ids
        self._count = count
        self._reported: OrderedDict[str, None] = OrderedDict()  # The list names a conversation several times.

    def check_method(self, report: Report) -> None:
        """Report a conversation of one of our agents that anyone could begin."""
        if report.agent_id in self._agent_ids and report.authorization_method in OPEN_METHODS:
            self.report(report, reason=report.authorization_method)

    def report(self, report: Report, *, reason: str) -> None:
        """Log and count a conversation, unless this process has reported it before."""
        if report.conversation_id in self._reported:
            return
        self._reported[report.conversation_id] = None
        if len(self._reported) > _MAX_REMEMBERED:
            self._reported.popitem(last=False)
        self._count(reason)
        _log.warning(
            "conversation.bypassed",
            conversation_id=report.conversation_id,
            agent_id=report.agent_id,
            reason=reason,
            note="this conversation began without a pass, so no limit counts it: enable authentication for the agent, "
            "revoke its shareable link, and look for other holders of an API key",
        )
