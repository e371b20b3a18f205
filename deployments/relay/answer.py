"""One answer as its client sees it, over the replicas that it takes. Decides; sends nothing."""

from starlette.types import Message

from deployments import inference_stream
from deployments.openai.errors import ErrorAnswer
from deployments.openai.wire import event
from deployments.relay.frames import Frame, Kind
from deployments.relay.heads import ResponseHead
from deployments.relay.seam import Seam, SeamMismatchError, Told, split_events
from deployments.replays import REPLAYED_HEADER

MAX_REPLICAS = 8  # that one request may outlive: it may be what they die of
_TOLD_AGAIN = frozenset({"/v1/completions", "/v1/chat/completions", inference_stream.PATH})


class RelayedAnswer:
    """Frames of one replica after the other in, ASGI messages to one client out.

    The only owner of what the client has. An answer that is no event stream goes out as a whole,
    so that until its end a replica's death is nothing to its client.
    """

    def __init__(self, path: str) -> None:
        self.is_done = False
        self.num_replicas = 0
        self._is_told_again = path in _TOLD_AGAIN
        self._notes = bytearray()
        self._told: list[bytes] = []  # whole events, as they were sent
        self._is_streaming = False
        self._head: ResponseHead | None = None  # of the present replica
        self._rest = b""  # of its body, what has not gone out
        self._seam: Seam | None = None

    @property
    def is_streaming(self) -> bool:
        """The client has the beginning of an event stream."""
        return self._is_streaming

    @property
    def notes(self) -> bytes:
        """What the replicas wrote of this request; the next one has to know it."""
        return bytes(self._notes)

    def begin(self) -> str | None:
        """Another replica takes the request; returns why it can't, if it can't."""
        if self.num_replicas == MAX_REPLICAS:
            return f"{MAX_REPLICAS} replicas in a row died with this request"
        self._head, self._rest, self._seam = None, b"", None
        if self._is_streaming:
            if not self._is_told_again:
                return "its replica died, and a stream of this endpoint can't be continued"
            self._seam = Seam(Told.by(split_events(b"".join(self._told))[0]))
        self.num_replicas += 1
        return None

    def hear(self, frame: Frame) -> list[Message]:
        """What to send for it."""
        match frame.kind:
            case Kind.NOTES:
                self._notes += frame.payload
            case Kind.HEAD:
                return self._hear_head(ResponseHead.decoded(frame.payload))
            case Kind.BODY:
                return self._hear_body(frame.payload)
            case Kind.END:
                return self._end()
            case Kind.FAILED:
                return self.give_up(_mistake())
        return []

    def give_up(self, error: ErrorAnswer) -> list[Message]:
        """The last words, in the form that is still possible."""
        self.is_done = True
        if self._is_streaming:
            return [_body(event(error.body))]
        head = ResponseHead(
            status=error.status,
            headers=(("content-type", "application/json"), *error.headers.items()),
        )
        return [head.message(), _body(error.body)]

    def _hear_head(self, head: ResponseHead) -> list[Message]:
        self._head = head
        if self._is_streaming or not head.is_event_stream:
            return []
        self._is_streaming = True
        return [self._start(head)]

    def _hear_body(self, data: bytes) -> list[Message]:
        assert self._head is not None, "an answer begins with its head"
        if not self._head.is_event_stream:
            self._rest += data
            return []
        if self._rest or not data.endswith(b"\n\n"):
            events, self._rest = split_events(self._rest + data)
            data = b"".join(events)
        return self._pass_on(data)

    def _pass_on(self, data: bytes) -> list[Message]:
        if self._seam is not None:
            try:
                data = b"".join(map(self._seam.feed, split_events(data)[0]))
            except SeamMismatchError as error:
                return self.give_up(_mismatch(error))
        if not data:
            return []
        self._told.append(data)
        return [_body(data, is_last=False)]

    def _end(self) -> list[Message]:
        assert self._head is not None, "an answer begins with its head"
        self.is_done = True
        if not self._is_streaming:
            return [self._start(self._head), _body(self._rest)]
        if not self._head.is_event_stream:  # the next replica refused what the first one took
            return [_body(event(self._rest))]
        return [_body(self._rest)]

    def _start(self, head: ResponseHead) -> Message:
        if self.num_replicas == 1:
            return head.message()
        num_replays = int(head.value(REPLAYED_HEADER) or 0) + self.num_replicas - 1
        return head.message(**{REPLAYED_HEADER: str(num_replays)})


def _body(data: bytes, *, is_last: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not is_last}


def _mistake() -> ErrorAnswer:
    return ErrorAnswer(status=500, message="The server made a mistake.", code="internal_error")


def _mismatch(error: SeamMismatchError) -> ErrorAnswer:
    return ErrorAnswer(
        status=500,
        message=f"The replica died, and the next one went on differently: {error}.",
        code="replay_mismatch",
    )
