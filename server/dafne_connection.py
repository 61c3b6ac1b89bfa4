"""Requests to a Dafne server: one key, certificates checked, tried again after a failure."""

import contextlib
import ipaddress
import json
import logging
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from io import BytesIO
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import tenacity
from pydantic import SecretStr

from dafne_federated.core.errors import ServerError, SettingsError

log = logging.getLogger(__name__)
# It logs headers as they come, and a server's may repeat the key.
logging.getLogger("httpcore").setLevel(logging.WARNING)
Result = TypeVar("Result")
Told = Callable[[int, int], None]

# Status codes that say "later" rather than "no"; a Dafne server says "no" with 500, too.
_LATER = {408, 429, 502, 503, 504}
_MEANING = {
    200: "it sent a message, not a file",
    400: "it did not get all of the request (its limit for uploads may be smaller)",
    401: "the key is unknown, or lacks the right to do this",
    403: "the key has no access to this model",
    404: "there is no such model or no such service",
    413: "the server takes no requests of this size",
}
_NO_MERGE = "the key lacks the merge permission of this model (administrators need it, too)"


class RefusedError(ServerError):
    """The server answered, and the answer is no.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoAnswerError(ServerError):
    """The server could not be reached, broke off, or is too busy: worth another try.

    Attributes:
        unsent: Whether it is certain that the server acted on nothing.
    """

    def __init__(self, message: str, unsent: bool) -> None:
        super().__init__(message)
        self.unsent = unsent


class DafneConnection:
    """Posts to one Dafne server.

    The key travels in the body, never in an address, and is cut out of whatever the server
    says before that reaches a message. Certificates are always checked; an authority of your
    own is named by the environment variable SSL_CERT_FILE.

    Args:
        address: As ``server_address`` returns it.
        key: Of the person.
        attempts: How often a request is made before it is given up.
        first_pause: Seconds before the second attempt; doubled each time, at most 30.
        seconds: How long the server may be silent.
    """

    def __init__(
        self,
        address: str,
        key: SecretStr,
        attempts: int = 4,
        first_pause: float = 1.0,
        seconds: float = 120.0,
    ) -> None:
        self.address = server_address(address)
        self.clock: int | None = None  # the server's, at its last answer, seconds since 1970
        self._key = key
        self._client = httpx.Client(
            base_url=self.address,
            timeout=httpx.Timeout(seconds, connect=15.0),
            headers={"Accept-Encoding": "identity"},
            trust_env=self.address.startswith("https:"),  # no proxy between here and loopback
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(NoAnswerError),
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential_jitter(initial=first_pause, max=30, jitter=first_pause),
            before_sleep=_tell_retry,
            reraise=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def again(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, and call it again after a pause if it ends in ``NoAnswerError``."""
        return self._retrying(function)

    def ask(self, route: str, **fields: str) -> dict[str, Any]:
        """Return the answer to a question, tried several times.

        Raises:
            ServerError: ``RefusedError``, or ``NoAnswerError`` after the last attempt.
        """
        return self.again(lambda: self._post(route, fields, None))

    def send(
        self, route: str, part: bytes, file_name: str, told: Told | None = None, **fields: str
    ) -> dict[str, Any]:
        """Return the answer to a part of a file, sent once.

        Args:
            route: Name of the service.
            part: The bytes.
            file_name: Name that the server sees.
            told: Called with the bytes sent so far and their total.
            fields: All else that the service needs.

        Raises:
            ServerError: ``RefusedError`` or ``NoAnswerError``.
        """
        return self._post(route, fields, (file_name, _Watched(part, told)))

    @contextlib.contextmanager
    def receive(self, route: str, first: int, **fields: str) -> Iterator[httpx.Response]:
        """Give the answer as a stream, from byte ``first`` on if the server can (status 206).

        Raises:
            ServerError: ``RefusedError``, or ``NoAnswerError``, also while the stream is read.
        """
        headers = {"Range": f"bytes={first}-"} if first else {}
        failure: ServerError | None = None
        try:
            with self._client.stream(
                "POST",
                route,
                json={**fields, "api_key": self._key.get_secret_value()},
                headers=headers,
            ) as response:
                if response.status_code not in (200, 206) or _is_message(response):
                    response.read()
                    self._refuse(route, response)
                yield response
        except httpx.HTTPError as error:
            failure = self._failed(error)
        if failure is not None:
            raise failure

    def _post(self, route: str, fields: dict[str, str], file: Any) -> dict[str, Any]:
        # The failure is raised outside of "except": httpx' frames hold the body with the key.
        try:
            if file is None:
                response = self._client.post(
                    route, json={**fields, "api_key": self._key.get_secret_value()}
                )
            else:
                response = self._client.post(
                    route,
                    data={**fields, "api_key": self._key.get_secret_value()},
                    files={"model_binary": file},
                )
        except httpx.HTTPError as error:
            failure = self._failed(error)
        else:
            return self._content(route, response)
        raise failure

    def _content(self, route: str, response: httpx.Response) -> dict[str, Any]:
        if response.status_code != 200:
            self._refuse(route, response)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self.clock = int(parsedate_to_datetime(response.headers["Date"]).timestamp())
        if (content := _json_object(response)) is None:
            # The FastAPI server reports a damaged upload as [message, 500] with status 200.
            msg = f"{route}: the server reports a failure: {self._said(response)}"
            raise RefusedError(msg, response.status_code)
        return content

    def _refuse(self, route: str, response: httpx.Response) -> None:
        status = response.status_code
        if status in _LATER:
            msg = f"{route}: the server is busy (status {status})"
            raise NoAnswerError(msg, unsent=status in (429, 503))
        if 300 <= status < 400:
            target = self._without_key(response.headers.get("Location", ""))
            msg = f"{route}: the server points to {target!r}; give the address that it is at"
            raise RefusedError(msg, status)
        meaning = _MEANING.get(status, "it does not do this")
        if status == 401 and route == "upload_merged_model":
            meaning = _NO_MERGE
        msg = f"{route}: refused with status {status}, {meaning}: {self._said(response)}"
        raise RefusedError(msg, status)

    def _failed(self, error: httpx.HTTPError) -> ServerError:
        words = self._without_key(str(error) or type(error).__name__)
        if "CERTIFICATE_VERIFY_FAILED" in words:
            msg = (
                f"{self.address}: its certificate cannot be verified; if your institution has an "
                "authority of its own, name its file in SSL_CERT_FILE"
            )
            return RefusedError(msg, 0)
        unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
        return NoAnswerError(f"{self.address}: no answer: {words}", unsent)

    def _said(self, response: httpx.Response) -> str:
        """Return what the server says, on one line, without the key that it may repeat."""
        try:
            content = response.json()
        except ValueError:
            content = response.text
        if isinstance(content, dict):
            content = content.get("message") or content.get("detail") or content
        text = content if isinstance(content, str) else json.dumps(content)
        return self._without_key(" ".join(text.split()))[:200] or "(nothing)"

    def _without_key(self, text: str) -> str:
        key = self._key.get_secret_value()
        for form in (key, json.dumps(key)[1:-1]):  # as it is, and as it stands in JSON
            text = text.replace(form, "***")
        return text


def server_address(text: str) -> str:
    """Return the address of a server with one slash at its end.

    Raises:
        SettingsError: It is not https (http is only for this machine), or it holds a user,
            password or query.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.userinfo or url.query or url.fragment:
        msg = "server: expected an address without user, password and query"
        raise SettingsError(msg)
    if not url.host or url.scheme not in ("https", "http"):
        msg = f"server: expected an address such as https://dafne.example.org/api/, got {text!r}"
        raise SettingsError(msg)
    if url.scheme == "http" and not _loopback(url.host):
        msg = f"server: expected https (the key would travel openly), got {text!r}"
        raise SettingsError(msg)
    return str(url).rstrip("/") + "/"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_message(response: httpx.Response) -> bool:
    """Return whether this is text for people: PHP reports its own errors with status 200."""
    kind: str = response.headers.get("Content-Type", "")
    return kind.startswith(("text/html", "application/json"))


def _json_object(response: httpx.Response) -> dict[str, Any] | None:
    try:
        content = response.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


class _Watched(BytesIO):
    """Bytes that tell how far they were read."""

    def __init__(self, data: bytes, told: Told | None) -> None:
        super().__init__(data)
        self._size, self._told = len(data), told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self._told is not None:
            self._told(self.tell(), self._size)
        return data


def _tell_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("%s; attempt %s follows", error, state.attempt_number + 1)
