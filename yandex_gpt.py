# SPDX-License-Identifier: MIT-0
"""yandex_gpt: the text models of Yandex AI Studio over `requests`, in one file to copy.

    from yandex_gpt import Model

    model = Model("yandexgpt")              # YC_FOLDER_ID and a credential from the environment
    print(model.run("Why is the sky blue?").text)                  # one answer
    for part in model.run_stream("Tell me a story"):               # an answer as it is written
        print(part.delta, end="")
    talk = ["Hello!"]
    talk.append(model.run(talk))                                   # a conversation
    model.configure(tools=[weather]).run_tools("Rain in Omsk?")    # Python functions as tools
    id = model.run_deferred("A long task").id                      # collected later, elsewhere:
    model.attach_deferred(id).wait()

All times are seconds. `timeout` is the deadline of a whole call: connecting, retries, back-off
and reading (only the look-up of a host's name cannot be bounded); None is no limit. What every
call may raise is listed under "Errors", what goes over the wire in the table `_CALLS`.
"""

from __future__ import annotations

__version__ = "1.0.0"

import base64
import inspect
import io
import json
import logging
import os
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
import types
import typing
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import lru_cache, partial
from http.client import HTTPException, HTTPResponse
from http.client import responses as _PHRASES
from importlib import import_module
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from langchain_core.language_models import BaseChatModel  # type: ignore[import-not-found, unused-ignore]

__all__ = [
    "ClientConfig", "RetryConfig", "ModelConfig", "APIKeyAuth", "IAMTokenAuth", "EnvIAMTokenAuth",
    "OAuthTokenAuth", "MetadataAuth", "YandexCloudCLIAuth", "NoAuth", "YandexGPTError",
    "ConfigError", "APIError", "BadRequestError", "AuthenticationError", "PermissionDeniedError",
    "NotFoundError", "RateLimitError", "ServerError", "ConnectionFailed", "DeadlineExceeded",
    "StreamInterrupted", "InvalidResponse", "OperationError", "OperationNotReady", "PollTimeout",
    "DatasetValidationError", "ToolLoopError", "TextMessage", "ToolCall", "FunctionTool", "Status",
    "Alternative", "Usage", "Token", "Result", "Model", "ChatModel", "OperationStatus", "Operation",
    "Dataset", "Lora", "PromptTune", "LinearScheduler", "CosineScheduler", "ConstantScheduler",
    "AdamW", "main"]

_T = TypeVar("_T")
_log = logging.getLogger("yandex_gpt")

# --- Configs --------------------------------------------------------------------------------------


class _Value:
    """A dataclass' repr, equality and hash, here once: compiled for every class, they would take
    half of the import. A dict or list inside does not stand in the way of a hash."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __repr__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def _compared(self) -> tuple[Any, ...]:
        return tuple([getattr(self, f.name) for f in fields(self) if f.compare])

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and bool(self._compared() == other._compared())

    def __hash__(self) -> int:
        return hash(_frozen(self._compared()))


def _quick(kind: type[_T], **values: Any) -> _T:
    """A frozen value without its constructor, which sets fields one by one: for streams."""
    value = object.__new__(kind)
    value.__dict__.update(values)
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, (Mapping, list, tuple, set)):
        return frozenset(map(_frozen, value.items() if isinstance(value, Mapping) else value))
    return value


@dataclass(frozen=True, repr=False, eq=False)
class RetryConfig(_Value):
    """Attempts in all, and the bounds in seconds of the pauses between them (full jitter).

    A 429 about concurrency (its message says "gauge") is no attempt: it is tried until the
    deadline. `max_attempts=1` switches every retry off.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.5
    max_backoff: float = 10.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        _check_count("max_attempts", self.max_attempts)
        for name in ("initial_backoff", "max_backoff", "multiplier"):
            _check_seconds(name, getattr(self, name))


class _Auth:
    """A credential: a value that shows its secret nowhere. `_fetch` gives the Authorization header
    and for how many seconds it may be kept; kept is what costs a request (`cached`)."""

    kind: ClassVar[str]  # as errors name it
    cached: ClassVar[bool] = False

    def __init__(self, secret: Any = None) -> None:
        self._secret: Any = _header(self.kind, secret) if isinstance(secret, str) else secret

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return f"Bearer {self._secret}", 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'***' if self._secret else ''})"

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and bool(self._secret == other._secret)

    def __hash__(self) -> int:
        return hash((type(self), self._secret))


class APIKeyAuth(_Auth):
    """An API key of a service account; it implies the folder."""

    kind = "API key"

    def __init__(self, key: str) -> None:
        super().__init__(key)

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return f"Api-Key {self._secret}", 0


class IAMTokenAuth(_Auth):
    """An IAM token (t1.…), which ends after 12 hours at most."""

    kind = "IAM token"

    def __init__(self, token: str) -> None:
        super().__init__(token)


class EnvIAMTokenAuth(_Auth):
    """An IAM token in an environment variable, read anew for each request."""

    kind = "IAM token of the environment"

    def __init__(self, name: str = "YC_TOKEN") -> None:
        super().__init__(name)

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return f"Bearer {_header(f'variable {self._secret}', _environ(self._secret))}", 0


class OAuthTokenAuth(_Auth):
    """An OAuth token (y0_… to y3_…), exchanged each hour by POST /iam/v1/tokens."""

    kind = "OAuth token"
    cached = True

    def __init__(self, token: str) -> None:
        super().__init__(token)

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return client.request(
            "iam", {"yandexPassportOauthToken": self._secret}, deadline,
            lambda answer, _: (f"Bearer {_header('IAM token', answer['iamToken'])}", 3600))


class MetadataAuth(_Auth):
    """The service account of the function or machine that runs this code.

    `url`: where its token is; None: at YC_METADATA_ADDR, else at 169.254.169.254.
    """

    kind = "IAM token of the metadata service"
    cached = True
    path: ClassVar[str] = "/computeMetadata/v1/instance/service-accounts/default/token"

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url)

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        def read(answer: Any, headers: Any) -> tuple[str, float]:
            seconds = _integer(answer.get("expires_in") or 3600)
            return f"Bearer {_header(self.kind, answer['access_token'])}", min(3600, 0.9 * seconds)

        url = self._secret or _environ("YC_METADATA_ADDR") or "169.254.169.254"
        url = url if "://" in url else f"http://{url}"
        url = url if urlsplit(url).path.strip("/") else url.rstrip("/") + self.path
        return client.request("metadata", None, deadline, read, url=url)


class YandexCloudCLIAuth(_Auth):
    """Whoever `yc` is logged in as: for work at a terminal."""

    kind = "IAM token of yc"
    cached = True

    def __init__(self, profile: str | None = None) -> None:
        super().__init__(profile)

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        import subprocess

        command = ["yc", "iam", "create-token"] + ["--profile", self._secret] * bool(self._secret)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  check=True, timeout=deadline.within(10).left())
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip()[-200:]
            raise ConfigError(f"`{' '.join(command)}` failed: {said}; run `yc init`") from error
        return f"Bearer {_header(self.kind, done.stdout)}", 3600


class NoAuth(_Auth):
    """No credential: for a gateway of one's own that adds it."""

    kind = "missing credential"

    def __init__(self) -> None:
        super().__init__()

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return "", 0


class _FunctionAuth(_Auth):
    """A function that gives a key or token, called for each request."""

    kind = "token that your function gave"

    def _fetch(self, client: _Client, deadline: _Deadline) -> tuple[str, float]:
        return _as_auth(self._secret())._fetch(client, deadline)

    def __getstate__(self) -> dict[str, Any]:
        _check_picklable("auth", self._secret)
        return self.__dict__


def _as_auth(value: Any) -> _Auth:
    """Any accepted form of `auth`; a string is told apart by how it begins."""
    if isinstance(value, str):
        value = _header("auth", value)
        if re.match("y[0-3]_", value):
            return OAuthTokenAuth(value)
        return IAMTokenAuth(value) if value.startswith("t1.") else APIKeyAuth(value)
    if not isinstance(value, _Auth) and not callable(value):
        raise ConfigError("auth is a key or token, a function that gives one, or an object such as "
                          f"APIKeyAuth(key), not {type(value).__name__}")
    return value if isinstance(value, _Auth) else _FunctionAuth(value)


def _find_auth(client: _Client, deadline: _Deadline) -> _Auth:
    """The first credential that the environment has."""
    import shutil

    if _environ("YC_API_KEY"):
        return APIKeyAuth(_environ("YC_API_KEY"))
    if _environ("YC_IAM_TOKEN"):
        return EnvIAMTokenAuth("YC_IAM_TOKEN")
    if _environ("YC_OAUTH_TOKEN"):
        return OAuthTokenAuth(_environ("YC_OAUTH_TOKEN"))
    metadata, patience = MetadataAuth(), 1 if _environ("YC_METADATA_ADDR") else 0.1
    try:
        client.keep(metadata._fetch(client, deadline.within(patience)))
        return metadata
    except (APIError, ConnectionFailed, DeadlineExceeded, InvalidResponse) as error:
        deadline.left()  # raises, if it was the caller's deadline that ended
        reason = type(error).__name__
    if _environ("YC_TOKEN"):
        return EnvIAMTokenAuth("YC_TOKEN")
    if shutil.which("yc"):
        return YandexCloudCLIAuth()
    if _is_lesson(client.config):
        return APIKeyAuth("any")
    raise ConfigError("no credential found; looked for YC_API_KEY, YC_IAM_TOKEN, YC_OAUTH_TOKEN, the "
                      f"metadata service ({reason}), YC_TOKEN, yc. Set YC_API_KEY or pass auth=")


@dataclass(frozen=True, repr=False, eq=False)
class ClientConfig(_Value):
    """How to reach the service. Equal configs share a token and the places of `max_concurrency`.

    folder_id        what is billed; None: YC_FOLDER_ID
    auth             a key or token, a function that gives one, an …Auth; None: the environment's
    endpoint         one base URL for REST; None: YANDEX_GPT_ENDPOINT, else Yandex Cloud's hosts
    grpc_endpoint    grpc[s]://host:port; None: YANDEX_GPT_GRPC_ENDPOINT, else as `endpoint`
    max_concurrency  most requests in flight at once in this process; an open stream is one
    data_logging     False asks the service to log no requests
    verify           True, False (trust anybody) or the path of a CA bundle
    """

    folder_id: str | None = None
    auth: Any = None
    endpoint: str | None = None
    grpc_endpoint: str | None = None
    retry: RetryConfig = field(default_factory=RetryConfig)
    max_concurrency: int | None = None
    data_logging: bool | None = None
    verify: bool | str = True

    def __post_init__(self) -> None:
        if self.folder_id is not None:
            _check_id("folder_id", self.folder_id)
        if self.max_concurrency is not None:
            _check_count("max_concurrency", self.max_concurrency)
        if self.auth is not None:
            object.__setattr__(self, "auth", _as_auth(self.auth))
        if isinstance(self.verify, os.PathLike):
            object.__setattr__(self, "verify", os.fspath(self.verify))
        for name, kinds in (("retry", RetryConfig), ("verify", (bool, str))):
            if not isinstance(getattr(self, name), kinds):
                raise ConfigError(f"{name} cannot be {type(getattr(self, name)).__name__}")
        for name in ("endpoint", "grpc_endpoint"):
            if getattr(self, name) is not None:
                _check_endpoint(name, getattr(self, name), self.auth)


def _check_endpoint(name: str, url: Any, auth: _Auth | None) -> None:
    """ConfigError, unless it is a URL to which the credential may be sent."""
    safe, plain = ("grpcs", "grpc") if name == "grpc_endpoint" else ("https", "http")
    path = r"/?" if plain == "grpc" else r"(?:/[\w.~/-]*)?"
    match = re.fullmatch(rf"({safe}|{plain})://([\w.-]+|\[[\da-f:.]+\])(?::(\d{{1,5}}))?{path}", str(url))
    if not match or not 0 < int(match[3] or 1) < 65536:
        raise ConfigError(f"{name} looks like {safe}://host:port, without user, query or spaces")
    harmless = auth is None or isinstance(auth, NoAuth) or _is_loopback(match[2])
    if match[1] == plain and not harmless:
        raise ConfigError(f"{name}={url!r} would show your credential to the network; use {safe}://, "
                          "or auth=NoAuth() if the gateway there adds it")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "[::1]") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def _is_lesson(config: ClientConfig) -> bool:
    """YANDEX_GPT_ENDPOINT names a server of this machine: a stand-in, happy with any key."""
    match = re.match(r"https?://(\[.*\]|[^:/]+)", _environ("YANDEX_GPT_ENDPOINT"))
    return config.endpoint is None and match is not None and _is_loopback(match[1])


def _check_id(name: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value, re.ASCII) and ".." not in value:
        return value
    raise ConfigError(f"{name} has letters, digits, _, - and . only, unlike {value!r}")


def _check_seconds(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is a positive, finite number, not {value!r}")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} is a whole number from 1 up, not {value!r}")


def _environ(name: str) -> str:
    return os.environ.get(name, "").strip()


def _header(what: str, value: Any) -> str:
    """Strips what came along with copy and paste; refuses what no header can hold."""
    if isinstance(value, str) and re.fullmatch("[!-~]+", value.strip()):
        return value.strip()
    raise ConfigError(f"the {what} is empty, or has characters that no key or token has")


def _check_picklable(what: str, function: Any) -> None:
    if "<" in getattr(function, "__qualname__", ""):  # <lambda> or <locals>
        from pickle import PicklingError

        raise PicklingError(f"{what} cannot be pickled: {function.__qualname__} is not defined at "
                            "the top level of a module")


@dataclass(frozen=True, repr=False, eq=False)
class ModelConfig(_Value):
    """How to ask; None leaves it to the service.

    temperature          0 to 1, from dull to wild
    max_tokens           most tokens of the answer
    reasoning_mode       Model: disabled, enabled_hidden; ChatModel: low, medium, high
    response_format      "json", {"json_schema": …, "name"?, "strict"?}, a dataclass, a TypedDict,
                         a pydantic model or dataclass
    tools                Python functions and FunctionTools, one or several
    parallel_tool_calls  False: one call at a time
    tool_choice          none, auto, required, a tool, {"type": "function", "function": {"name"}}
    extra_query          merged into the request's body last
    """

    temperature: float | None = None
    max_tokens: int | None = None
    reasoning_mode: str | None = None
    response_format: Any = None
    tools: Any = None
    parallel_tool_calls: bool | None = None
    tool_choice: Any = None
    extra_query: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"temperature": (int, float), "max_tokens": int, "reasoning_mode": str,
                                 "parallel_tool_calls": bool, "extra_query": Mapping}
        for name, kind in kinds.items():
            value = getattr(self, name)
            stray = isinstance(value, bool) and kind is not bool
            if value is not None and (stray or not isinstance(value, kind)):
                raise TypeError(f"{name} cannot be {value!r}")
        if self.tools is not None:
            object.__setattr__(self, "tools", _as_tools(self.tools))
        if self.tool_choice is not None:
            _tool_choice(self.tool_choice)
        if self.response_format is not None:
            _format_schema(self.response_format)


# --- Errors ---------------------------------------------------------------------------------------
#
# YandexGPTError
# ├── ConfigError (ValueError)            wrong input; nothing was sent
# ├── APIError                            the service answered with an error:
# │   └── BadRequestError 400, AuthenticationError 401, PermissionDeniedError 403,
# │       NotFoundError 404, RateLimitError 429, ServerError 5xx
# ├── ConnectionFailed (ConnectionError)  no answer, or a broken one
# ├── DeadlineExceeded (TimeoutError)     `timeout` is over
# └── StreamInterrupted, InvalidResponse, OperationError, OperationNotReady,
#     PollTimeout (TimeoutError), DatasetValidationError, ToolLoopError


class YandexGPTError(Exception):
    """Base of all. It pickles, with its attributes; those that do not apply are None.

    `partial` is the last Result of a stream; `idempotency_key` belongs to a call that creates
    something; `operation_id` names the operation that goes on at the service.
    """

    partial: Result | None = None
    request_id: str | None = None
    client_request_id: str | None = None
    idempotency_key: str | None = None
    operation_id: str | None = None

    def __init__(self, text: str = "", /, **attributes: Any) -> None:
        super().__init__(text)
        self.__dict__.update(attributes)

    def _add(self, text: str) -> None:
        self.args = (f"{str(self.args[0]).rstrip('.')}. {text}",)


class ConfigError(YandexGPTError, ValueError):
    """A wrong argument, config or environment; nothing was sent."""


class APIError(YandexGPTError):
    """The service answered with an error. `code` is the gRPC name, such as RESOURCE_EXHAUSTED,
    `message` the service's text, `retry_after` in seconds."""

    status_code: int = 0
    code: str = ""
    message: str = ""
    details: Any = ()
    retry_after: float | None = None


class BadRequestError(APIError):
    """400: the request, the model's URI or the folder is wrong."""


class AuthenticationError(APIError):
    """401: the credential is wrong or has expired."""


class PermissionDeniedError(APIError):
    """403: the account has no role for this in the folder."""


class NotFoundError(APIError):
    """404: there is no such model, operation or dataset."""


class RateLimitError(APIError):
    """429: a quota is used up, often that of generations at one time."""


class ServerError(APIError):
    """5xx: the service, or a balancer before it, failed."""


class ConnectionFailed(YandexGPTError, ConnectionError):
    """No answer came, or a broken one. Where `retry` is False another attempt cannot help."""

    retry: bool = True


class DeadlineExceeded(YandexGPTError, TimeoutError):
    """`timeout` was over before the whole answer was there."""


class StreamInterrupted(YandexGPTError):
    """A stream ended before the model did; `partial` is what came."""


class InvalidResponse(YandexGPTError):
    """A success that is not what the API promises."""


class OperationError(YandexGPTError):
    """An operation failed or was cancelled; `code` is the gRPC name."""

    code: str = ""
    message: str = ""
    details: Any = ()


class OperationNotReady(YandexGPTError):
    """The operation still runs."""


class PollTimeout(YandexGPTError, TimeoutError):
    """`poll_timeout` is over and the operation goes on: so can `error.operation.wait()`."""

    operation: Operation[Any]


class DatasetValidationError(YandexGPTError):
    """The service finds the data unfit: `errors` are dicts of name, description and rows."""

    dataset_id: str = ""
    errors: tuple[dict[str, Any], ...] = ()


class ToolLoopError(YandexGPTError):
    """`max_rounds` answers in a row called tools; `messages` is the conversation."""

    messages: list[Any]


_GRPC_CODES = """OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS
PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL
UNAVAILABLE DATA_LOSS UNAUTHENTICATED""".split()
_HTTP_STATUS = (200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401)
# HTTP status: class, gRPC code where the service names none, what to do next
_BY_STATUS: dict[int, tuple[type[APIError], int, str]] = {
    400: (BadRequestError, 3, "Are the model URI {model} and the folder {folder} right, and the "
                              "service account of that folder?"),
    401: (AuthenticationError, 16, "The {kind} was refused: is it whole, in force, of this cloud?"),
    403: (PermissionDeniedError, 7, "Give the account of the {kind} the role "
                                    "ai.languageModels.user in the folder {folder}"),
    404: (NotFoundError, 5, "Check the id, the model URI {model} and the folder {folder}"),
    429: (RateLimitError, 8, "Set ClientConfig(max_concurrency=…), or have the quota {quota}raised"),
    501: (ServerError, 12, "The service does not offer this"),
    503: (ServerError, 14, "Try again later"),
    504: (ServerError, 4, "Try again, with a shorter request if that does not help")}


def _grpc_name(number: Any) -> str:
    """The name of a gRPC code; "" for what is none."""
    return _GRPC_CODES[number] if type(number) is int and 0 < number < 17 else ""


def _error_from(exchange: _Exchange, status: int, headers: Mapping[str, str], body: Any) -> APIError:
    """The one place where an answer, or a line of one, becomes an exception. A `status` of
    success is that of a stream which began well: its line tells what went wrong."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):  # a balancer's page, or nothing
        page = re.sub("(?s)<style.*?</style>|<[^>]*>", " ", str(error or ""))
        error = {"message": " ".join(page.split())}
    number = error.get("grpcCode", error.get("code"))
    name = _grpc_name(number)
    if status < 300:
        known = [n for n in (error.get("httpCode"), number) if type(n) is int and 400 <= n < 600]
        status = [*known, _HTTP_STATUS[number] if name else 500][0]
    kind, code, hint = _BY_STATUS.get(status) or (ServerError, 13, "Try again later")
    if status < 500 and status not in _BY_STATUS:
        kind, code, hint = APIError, 2, "Redirects are not followed" if status < 400 else ""
    name, request_id = name or _GRPC_CODES[code], headers.get("x-request-id")
    message = exchange.hide(str(error.get("message") or "no message")[:500])
    quota = re.search(r"[\w.-]+(?= gauge| quota)", message)
    hint = hint.format(quota=f"{quota[0]} " if quota else "", **exchange.about)
    shown = f" (request id {request_id})" if request_id else ""
    return kind(f"{status} {name}: {message.rstrip('.')}. {hint}{shown}", status_code=status, code=name,
                message=message, details=error.get("details") or (), request_id=request_id,
                retry_after=_retry_after(headers.get("retry-after") or ""))


def _retry_after(value: str) -> float | None:
    """Seconds, of a Retry-After that is a number or a date; None for anything else."""
    from email.utils import parsedate_to_datetime

    with suppress(ValueError, TypeError, LookupError, OverflowError):
        if re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


# --- Messages, tools, results ---------------------------------------------------------------------

#: What `run` takes: a text, a dict, a message, an earlier answer, or an iterable that mixes these
Messages = Union[str, Mapping[str, Any], "TextMessage", "Alternative", "Result", Iterable[Any]]


@dataclass(frozen=True, repr=False, eq=False)
class TextMessage(_Value):
    """A message; `role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True, repr=False, eq=False)
class ToolCall(_Value):
    """A function that the model wants called. The native API gives all numbers as floats, and
    no `id`."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class Status(str, Enum):
    """How an alternative stands; what this version does not know is UNSPECIFIED."""

    UNSPECIFIED = "UNSPECIFIED"
    PARTIAL = "PARTIAL"
    TRUNCATED_FINAL = "TRUNCATED_FINAL"
    FINAL = "FINAL"
    CONTENT_FILTER = "CONTENT_FILTER"
    TOOL_CALLS = "TOOL_CALLS"


@dataclass(frozen=True, repr=False, eq=False)
class Alternative(_Value):
    """One of a model's answers. As a message, it carries the conversation on."""

    role: str
    text: str
    status: Status
    tool_calls: tuple[ToolCall, ...] | None = None
    reasoning_text: str | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Usage(_Value):
    """What is billed, in tokens."""

    input_text_tokens: int
    completion_tokens: int
    total_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, repr=False, eq=False)
class Token(_Value):
    """One token of a text; the special ones are the chat template's."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True, repr=False, eq=False)
class Result(_Value):
    """What a model answered: a sequence of alternatives, with shortcuts to the first.

    `delta` is what the Result before it in a stream had not, after `run` the whole text; `raw` is
    the decoded JSON.

    >>> str(Result((Alternative("assistant", "Hi", Status.FINAL),), None, "23.10.2024"))
    'Hi'
    """

    alternatives: tuple[Alternative, ...]
    usage: Usage | None
    model_version: str
    delta: str = field(default="", repr=False, compare=False)
    request_id: str | None = field(default=None, repr=False, compare=False)
    raw: Any = field(default=None, repr=False, compare=False)
    _sent: Sequence[Any] = field(default=(), repr=False, compare=False)
    _format: Any = field(default=None, repr=False, compare=False)

    def __getitem__(self, index: int) -> Alternative:
        return self.alternatives[index]

    def __len__(self) -> int:
        return len(self.alternatives)

    def __str__(self) -> str:
        return self.text

    @property
    def role(self) -> str:
        return self.alternatives[0].role

    @property
    def text(self) -> str:
        return self.alternatives[0].text

    @property
    def status(self) -> Status:
        return self.alternatives[0].status

    @property
    def tool_calls(self) -> tuple[ToolCall, ...] | None:
        return self.alternatives[0].tool_calls

    @property
    def reasoning_text(self) -> str | None:
        return self.alternatives[0].reasoning_text

    @property
    def messages(self) -> list[Any]:
        """The conversation with this answer: append to it, and run again."""
        return [*self._sent, self.alternatives[0]]

    def parse(self) -> Any:
        """The text as `response_format` has it: an instance of the type, else the JSON value.

        Raises ValueError, which shows the text, when the model broke the format.
        """
        return _parse(self.text, self._format)

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers, ready for `json.dumps`."""
        return json.loads(json.dumps(_plain(self), default=_plain))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """For `json.dumps`: a dataclass or pydantic model as a dict, anything else as text."""
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


@dataclass(frozen=True, repr=False, eq=False)
class FunctionTool(_Value):
    """A function that the model may call; `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool | None = None
    _function: Callable[..., Any] | None = field(default=None, repr=False, compare=False)

    def _to_json(self) -> dict[str, Any]:
        return _given(name=self.name, description=self.description or None,
                      parameters=self.parameters, strict=self.strict)

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> FunctionTool:
        """A tool from a function's name, docstring, type hints and defaults."""
        if not inspect.isroutine(function) or inspect.iscoroutinefunction(function):
            raise TypeError(f"a tool is a FunctionTool or a plain function, not {function!r}")
        name = re.sub(r"\W", "", function.__name__)
        doc = inspect.cleandoc(function.__doc__ or "")
        summary = re.split(r"\n\s*\n|(?:^|\n)(?::param|Args:)", doc)[0]
        return cls(name, " ".join(summary.split()), _schema(function, name), _function=function)

    def __getstate__(self) -> dict[str, Any]:
        if "<" in getattr(self._function, "__qualname__", ""):  # <lambda> or <locals>
            from pickle import PicklingError

            advice = "its function must be defined with def at the top level of a module"
            raise PicklingError(f"tool {self.name!r} cannot be pickled: {advice}")
        return self.__dict__


_REQUIRED = inspect.Parameter.empty  # in place of a default
_FORMS: dict[Any, str] = {
    Any: "any", Literal: "choice", Union: "union", getattr(types, "UnionType", Union): "union",
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}


def _form(hint: Any) -> tuple[str | None, Any, tuple[Any, ...]]:
    """What a type hint is to JSON (None: nothing), its bare type and that one's arguments."""
    hint = hint.__origin__ if get_origin(hint) is Annotated else hint
    hint = getattr(hint, "__supertype__", hint)  # a NewType is what it is made of
    kind, args = get_origin(hint) or hint, get_args(hint)
    form = _FORMS.get(kind) if isinstance(kind, Hashable) else None
    if hasattr(kind, "__pydantic_validator__"):
        form = "pydantic"
    elif is_dataclass(kind) or hasattr(kind, "__required_keys__") or inspect.isroutine(kind):
        form = "fixed object"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        form, args = "choice", tuple(kind)
    elif kind is dict and args:
        form, args = "object" if args[0] is str else None, args[1:]
    elif kind is tuple and args:
        form, args = ("array", args[:1]) if args[-1] is ... else ("fixed array", args)
    return form, kind, args or (Any,)


def _members(owner: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Hint and default of a function's parameters, or a dataclass' or TypedDict's fields."""
    try:
        hints = typing.get_type_hints(owner, include_extras=True)
    except Exception as error:
        raise TypeError(f"{where}: {error} (in the hints {owner.__annotations__})") from error
    members: dict[str, tuple[Any, Any]] = {}
    if hasattr(owner, "__required_keys__"):
        for name, hint in hints.items():
            # Asked first, as __required_keys__ does not see into quoted hints, and by name, as
            # before Python 3.11 these forms come from typing_extensions.
            mark = getattr(get_origin(hint), "_name", None)
            needed = name in owner.__required_keys__
            if mark in ("Required", "NotRequired"):
                needed, hint = mark == "Required", get_args(hint)[0]
            members[name] = hint, _REQUIRED if needed else ...
        return members
    for name, item in inspect.signature(owner).parameters.items():
        if item.kind not in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY):
            raise TypeError(f"{where}.{name}: a {item.kind.description} parameter is not supported")
        members[name] = hints.get(name, Any), item.default
    return members


def _json_value(choice: Any) -> Any:
    return choice.value if isinstance(choice, Enum) else choice


def _schema(hint: Any, where: str, defs: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON Schema of a type hint, or of a function's parameters.

    TypeError says `where` there is none. `defs` gathers pydantic's $defs for the outermost schema.
    """
    outer = {} if defs is None else defs
    form, kind, args = _form(hint)
    inner = (_schema(arg, where, outer) for arg in args)
    schema: dict[str, Any] = {"type": form}
    if form is None or where.count(".") > 30:
        problem = "is nested too deep" if form else "cannot be expressed as JSON Schema"
        raise TypeError(f"{where[:200]}: {hint!r} {problem}")
    if form == "any":
        schema = {}
    elif form == "union":
        schema = {"anyOf": list(inner)}
    elif form == "array":
        schema["items"] = next(inner)
    elif form == "object":
        schema["additionalProperties"] = next(inner)
    elif form == "fixed array":
        schema = {"type": "array", "prefixItems": list(inner)}
        schema["minItems"] = schema["maxItems"] = len(args)
    elif form == "choice":
        values = [_json_value(choice) for choice in args]
        one_of = [_schema(kind, where) for kind in {type(value) for value in values}]
        schema = {"enum": values, **(one_of[0] if len(one_of) == 1 else {})}
    elif form == "pydantic":
        schema = sys.modules["pydantic"].TypeAdapter(kind).json_schema()
        outer.update(schema.pop("$defs", {}))
    elif form == "fixed object":
        schema = _object_schema(kind, where, outer)
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, str):
            schema["description"] = note
    return {**schema, "$defs": outer} if outer and defs is None else schema


def _object_schema(owner: Any, where: str, defs: dict[str, Any]) -> dict[str, Any]:
    properties, required, doc = {}, [], inspect.cleandoc(owner.__doc__ or "")
    for name, (hint, default) in _members(owner, where).items():
        schema = properties[name] = _schema(hint, f"{where}.{name}", defs)
        # "name (type): text" or ":param type name: text", and the lines indented below it
        entry = rf"^([ \t]*)(?::param (?:[^:\n]* )?)?{name}(?: *\(.*?\))?:(.*(?:\n\1[ \t]+.*)*)"
        if found := re.search(entry, doc, re.MULTILINE):
            schema.setdefault("description", " ".join(found[2].split()))
        if default is _REQUIRED:
            required.append(name)
        with suppress(TypeError, ValueError):  # not every default is JSON
            schema["default"] = json.loads(json.dumps(_json_value(default), allow_nan=False))
    shape = {"type": "object", "properties": properties, "required": required}
    return {**shape, "additionalProperties": False}


def _arguments(function: Any, arguments: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A decoded JSON object as keyword arguments for a function, dataclass or TypedDict."""
    members = _members(function, where)
    paths = {name: f"{where}.{name}".lstrip(".") for name in [*arguments, *members]}
    for name, path in paths.items():
        if name not in members:
            raise ValueError(f"{path}: unknown; known are: {', '.join(members)}")
        if name not in arguments and members[name][1] is _REQUIRED:
            raise ValueError(f"{path}: missing")
    return {n: _convert(item, members[n][0], paths[n]) for n, item in arguments.items()}


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """A decoded JSON value as the annotated type; ValueError says `where` it does not fit."""
    form, kind, args = _form(annotation)
    if form == "any":
        return value
    if form == "pydantic":
        return sys.modules["pydantic"].TypeAdapter(kind).validate_json(json.dumps(value))
    if form == "fixed object" and isinstance(value, Mapping):
        return kind(**_arguments(kind, value, where))
    if form == "object" and isinstance(value, Mapping):
        return {key: _convert(item, args[0], f"{where}.{key}") for key, item in value.items()}
    if form in ("array", "fixed array") and isinstance(value, list):
        hints = args if form == "fixed array" else args * len(value)
        if len(hints) == len(value):
            items = enumerate(zip(value, hints))
            return kind(_convert(item, hint, f"{where}[{i}]") for i, (item, hint) in items)
    if form == "choice":
        plain = [_json_value(choice) for choice in args]
        for choice, known in zip(args, plain):
            if known == value and isinstance(known, bool) == isinstance(value, bool):
                return choice
        form = f"one of {plain}"
    if form == "union":
        errors = []
        for member in sorted(args, key=lambda member: member is not type(value)):
            try:
                return _convert(value, member, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; or ".join(errors))
    if type(value) is kind:
        return value
    if {type(value), kind} == {int, float} and (kind is float or value.is_integer()):
        return kind(value)
    raise ValueError(f"{where}: expected {form}, got {value!r}")


def _as_tool(value: Any) -> FunctionTool:
    return value if isinstance(value, FunctionTool) else FunctionTool.from_function(value)


def _as_tools(value: Any) -> tuple[FunctionTool, ...]:
    tools = tuple(map(_as_tool, value if isinstance(value, Iterable) else [value]))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"two tools have the same name: {', '.join(names)}")
    return tools


def _tool_choice(value: Any) -> tuple[str, str]:
    """("mode", "NONE" | "AUTO" | "REQUIRED") or ("function", its name)."""
    if isinstance(value, FunctionTool) or callable(value):
        return "function", _as_tool(value).name
    if isinstance(value, str) and value.upper() in ("NONE", "AUTO", "REQUIRED"):
        return "mode", value.upper()
    with suppress(KeyError, TypeError):
        if isinstance(value["function"]["name"], str):
            return "function", value["function"]["name"]
    forms = '"none", "auto", "required", {"type": "function", "function": {"name": ...}}'
    raise ValueError(f"tool_choice takes {forms} or a tool, not {value!r}")


def _format_schema(value: Any) -> tuple[str | None, dict[str, Any] | None, bool | None]:
    """The name, schema and strictness that a response_format asks for; "json" asks for none."""
    if value == "json":
        return None, None, None
    if isinstance(value, type) and _form(value)[0] in ("fixed object", "pydantic"):
        # Strict, yet a field with a default stays optional: the type itself says so.
        return re.sub(r"\W", "", value.__name__), _schema(value, value.__name__), True
    if isinstance(value, dict):
        inner = value.get("json_schema")  # with "schema" in it in OpenAI's own form
        given = inner if isinstance(inner, dict) and "schema" in inner else value
        for key in ("json_schema", "jsonschema", "schema"):
            if isinstance(given.get(key), dict):
                schema = json.loads(json.dumps(given[key], allow_nan=False))
                return given.get("name"), schema, given.get("strict")
    forms = '"json", {"json_schema": schema, "name"?, "strict"?}, a dataclass, a TypedDict'
    text = f"response_format takes {forms}, a pydantic model or dataclass, not {value!r}"
    raise ValueError(text) if isinstance(value, (str, dict)) else TypeError(text)


def _parse(text: str, response_format: Any) -> Any:
    """The JSON in a model's text, as the type that response_format is, if it is one."""
    hint = response_format if isinstance(response_format, type) else Any
    fenced = re.fullmatch(r"\s*```(?:json)?(.*)```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        return _convert(json.loads(fenced[1] if fenced else text), hint, "answer")
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"not the format asked for ({error}): {text[:200]!r}") from error


def _normalize(messages: Messages) -> list[dict[str, Any]]:
    """Any accepted form as dicts, from which both APIs encode, of one of these shapes:

    {role, text}, {role, content: [parts]}, {role, text, tool_calls: (ToolCall, …)},
    {tool_results: [{name, content, tool_call_id?}]}, {tool_call_id, content}
    """
    one = isinstance(messages, (str, bytes, Mapping)) or hasattr(messages, "role")
    several: Iterable[Any] = messages if isinstance(messages, Iterable) and not one else [messages]
    found = [_message(f"messages[{index}]", message) for index, message in enumerate(several)]
    if not found:
        raise ConfigError("messages is empty")
    return found


def _message(where: str, given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        return {"role": "user", "text": given}
    if isinstance(given, Mapping):
        keys, role = given.keys() - {"role"}, given.get("role", "user")
    elif hasattr(given, "role") and hasattr(given, "text"):
        keys, role = {"text"}, given.role
        if getattr(given, "tool_calls", None):
            keys.add("tool_calls")
        given = {key: getattr(given, key) for key in keys}
    else:
        keys, role = set(), ""
    with suppress(TypeError, ValueError, LookupError, AttributeError):
        if "tool_calls" in keys <= {"tool_calls", "text", "content"}:
            calls = tuple(map(_tool_call, given["tool_calls"]))
            text = given.get("text") or given.get("content") or ""
            return {"role": "assistant", "text": text, "tool_calls": calls}
        if keys == {"tool_results"}:
            return {"tool_results": [_tool_result(item) for item in given["tool_results"]]}
        if keys == {"tool_call_id", "content"}:
            return {key: _string(given, key) for key in keys}
        if isinstance(role, str) and role and keys in ({"text"}, {"content"}):
            (value,) = (given[key] for key in keys)
            if isinstance(value, str):
                return {"role": role, "text": value}
            if keys == {"content"} and isinstance(value, (list, tuple)):
                return {"role": role, "content": list(map(_part, value))}
    raise TypeError(
        f"{where} is {type(given).__name__} {', '.join(map(str, keys))}; expected a string, {{role, "
        "text}, {role, content}, TextMessage, an earlier result, {tool_results: [{name, content}]} or "
        "for ChatModel {tool_call_id, content}; a content part is a text, an image or a dict with type"
    )


def _tool_result(item: Mapping[str, Any]) -> dict[str, str]:
    if item.keys() - {"tool_call_id"} != {"name", "content"}:
        raise ValueError
    return {key: _string(item, key) for key in item if item[key] is not None}


def _tool_call(call: Any) -> ToolCall:
    """A ToolCall, also from OpenAI's form, whose arguments are a JSON text."""
    if isinstance(call, ToolCall):
        return call
    function = call["function"]
    arguments = json.loads(function.get("arguments") or "{}")
    return ToolCall(_string(function, "name"), dict(arguments), call.get("id") or None)


def _part(part: Any) -> dict[str, Any]:
    """A content part; an image as a Path or bytes becomes a data URL with its media type."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, (bytes, Path)):
        part = {"type": "image_url", "image_url": part}
    image = part.get("image_url") if part["type"] else None
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, (bytes, Path)):
        return dict(part)
    data = url.read_bytes() if isinstance(url, Path) else url
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
    kind = next(kind for start, kind in starts.items() if data.startswith(start))
    return {**part, "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def _integer(value: Any) -> int:
    """A 64-bit integer, which JSON has as a string or a number; absent is 0."""
    return int(value or 0)


def _string(mapping: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = mapping.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise TypeError(f"{key} is {type(value).__name__}, not a string")
    return value


def _given(**values: Any) -> dict[str, Any]:
    """What is set: unset fields are not sent."""
    return {key: value for key, value in values.items() if value is not None}


# --- Model ----------------------------------------------------------------------------------------

_Self = TypeVar("_Self", bound="_BaseModel")


class _BaseModel:
    """What both APIs share. A subclass says how a request is written and an answer is read."""

    _call: ClassVar[str]  # a line of _CALLS

    def __init__(self, name: str, *, version: str = "latest", folder_id: str | None = None,
                 auth: Any = None, client: ClientConfig | None = None,
                 config: ModelConfig | None = None) -> None:
        """`name`: such as "yandexgpt", or a whole URI (with ://). `folder_id` and `auth` override
        those of `client`. Raises ConfigError when there is no folder."""
        whole = "://" in name
        self.client = _settle(client, folder_id, auth, needed=not whole)
        self.config = config or ModelConfig()
        self.uri = name if whole else f"gpt://{self.client.folder_id}/{name}/{version}"
        if not re.fullmatch(r"\w+:/(/[^\s/]+){2,}", self.uri):
            raise ConfigError(f"{self.uri!r} is not like gpt://<folder>/yandexgpt/latest")
        if self.client.folder_id is None:
            self.client = replace(self.client, folder_id=self.uri.split("/")[2])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.uri, self.config, self.client))

    def configure(self: _Self, **changes: Any) -> _Self:
        """A new model with these fields of ModelConfig changed; None unsets one."""
        known = [f.name for f in fields(ModelConfig)]
        if not changes.keys() <= set(known):
            raise TypeError(f"configure() takes {', '.join(known)}; got {', '.join(changes)}")
        return self._with(config=replace(self.config, **changes))

    def _with(self: _Self, **attributes: Any) -> _Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, **attributes)
        return other

    def run(self, messages: Messages, *, timeout: float | None = 180) -> Result:
        """The model's answer; the tokens of messages and answer are billed.

        Raises APIError by status, ConnectionFailed, DeadlineExceeded; TypeError for what is no
        message. API: POST /foundationModels/v1/completion; ChatModel: /v1/chat/completions.
        """
        return self._run(_normalize(messages), _Deadline(timeout))

    def _run(self, messages: list[dict[str, Any]], deadline: _Deadline) -> Result:
        def read(answer: Any, headers: Mapping[str, str]) -> Result:
            return self._decode(answer, messages, headers.get("x-request-id"))

        body = self._encode(messages, stream=False)
        return _client(self.client).request(self._call, body, deadline, read)

    def run_stream(
        self, messages: Messages, *, timeout: float | None = 180
    ) -> Generator[Result, None, None]:
        """The answer as it is written: `.text` is all there is so far, `.delta` what is new.

        The request starts with the first `next()`; leaving the loop closes the connection.
        `timeout` counts the waits for the service alone. A stream that ends before the model
        did raises StreamInterrupted; every exception has the last Result as `.partial`.
        """
        normalized = _normalize(messages)
        _Deadline(timeout)  # a wrong one is refused here, not at the first `next()`
        return self._stream(self._encode(normalized, stream=True), normalized, timeout)

    def _stream(
        self, body: Any, messages: list[dict[str, Any]], timeout: float | None
    ) -> Generator[Result, None, None]:
        deadline, result = _Deadline(timeout), None
        exchange = None
        try:
            exchange, result, results = _client(self.client).stream(
                self._call, body, deadline, lambda lines: self._read(lines, messages))
            while True:
                handed_over = time.monotonic()
                yield result
                deadline.at += time.monotonic() - handed_over
                following = next(results, None)
                if following is None:
                    return
                result = following
        except ConnectionFailed as error:
            if result is None:
                raise
            interrupted = StreamInterrupted(f"the stream was cut: {error}", partial=result)
            raise (interrupted if exchange is None else exchange.described(interrupted)) from error
        except YandexGPTError as error:
            error.partial = result
            if exchange is not None:
                exchange.described(error)
            raise
        finally:
            if exchange is not None:
                exchange.close()

    def run_many(self, prompts: Iterable[Messages], *, workers: int = 10, timeout: float | None = 180,
                 return_errors: bool = False) -> Generator[Any, None, None]:
        """The answers to many prompts, in their order, `workers` at a time.

        Prompts are read as answers are taken, 2 * workers ahead at most. One that fails raises
        at its place (with `return_errors`, its exception stands there); what has not started is
        dropped then, what is in flight is finished. `timeout` is for each prompt.
        """
        _check_count("workers", workers)
        _Deadline(timeout)
        if isinstance(prompts, (str, Mapping)):
            raise TypeError("prompts is a list of prompts, not one of them")
        return self._many(iter(prompts), workers, timeout, return_errors)

    def _many(self, prompts: Iterator[Messages], workers: int, timeout: float | None,
              return_errors: bool) -> Generator[Any, None, None]:
        from concurrent.futures import Future, ThreadPoolExecutor
        from itertools import islice

        pool, waiting = ThreadPoolExecutor(workers), deque[Future[Result]]()
        try:
            while True:
                for prompt in islice(prompts, 2 * workers - len(waiting)):
                    waiting.append(pool.submit(self.run, prompt, timeout=timeout))
                if not waiting:
                    return
                future = waiting.popleft()
                error = future.exception()
                yield error if error and return_errors else future.result()
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown()

    def run_tools(self, messages: Messages, *, max_rounds: int = 10, timeout: float | None = 180) -> Result:
        """The model's answer, after the Python functions in `tools` that it asked for have run.

        Each round is a billed run; `timeout` is for all of them. An exception of a function, an
        unknown name, wrong arguments: the model is told. A `tool_choice` that forces a call does
        so once. Raises ToolLoopError after `max_rounds` answers that all called tools.
        """
        _check_count("max_rounds", max_rounds)
        deadline, talk, model = _Deadline(timeout), _normalize(messages), self
        tools = {tool.name: tool._function for tool in self.config.tools or ()}
        for _ in range(max_rounds):
            result = model._run(talk, deadline)
            if not result.tool_calls:
                return result
            answers = [{"name": call.name, "content": _run_tool(tools, call), "tool_call_id": call.id}
                       for call in result.tool_calls]
            talk = _normalize([*talk, result, {"tool_results": answers}])
            if model.config.tool_choice and _tool_choice(model.config.tool_choice) != ("mode", "NONE"):
                model = model.configure(tool_choice=None)
        raise ToolLoopError(f"the model still calls tools after {max_rounds} rounds; raise max_rounds, or "
                            "go on from error.messages", messages=talk, partial=result)

    def langchain(self, model_type: str = "chat", timeout: float | None = 60) -> BaseChatModel:
        """This model as a chat model of LangChain (extra `langchain`)."""
        if model_type != "chat":
            raise ConfigError(f"model_type is 'chat', not {model_type!r}")
        return _langchain(self, timeout)

    def _encode(self, messages: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        raise NotImplementedError  # the body of a request

    def _decode(self, answer: Any, sent: Sequence[Any], request_id: str | None) -> Result:
        raise NotImplementedError  # a whole answer; KeyError and the like: it is none

    def _read(self, lines: _Lines, sent: Sequence[Any]) -> Iterator[Result]:
        raise NotImplementedError  # a streamed answer; StreamInterrupted where it ends too soon


def _settle(client: ClientConfig | None, folder_id: str | None = None, auth: Any = None,
            needed: bool = True) -> ClientConfig:
    """The config with its folder, found now, so that it means the same in another process."""
    client = client or ClientConfig()
    folder = folder_id or client.folder_id or _environ("YC_FOLDER_ID") or None
    if not folder and needed:
        if not _is_lesson(client):
            raise ConfigError("no folder: pass folder_id=, or set YC_FOLDER_ID (it begins with b1g)")
        folder = "lesson"
    return replace(client, folder_id=folder, auth=client.auth if auth is None else auth)


def _run_tool(tools: Mapping[str, Callable[..., Any] | None], call: ToolCall) -> str:
    """What the model is told its call came to."""
    try:
        function = tools.get(call.name)
        if function is None:
            raise LookupError(f"there is no function {call.name!r}, but {', '.join(tools)}")
        value = function(**_arguments(function, call.arguments))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
    except Exception as error:  # the model, not the caller, has to deal with it
        _log.debug("the call of %s failed", call.name, exc_info=True)
        return f"Error: {type(error).__name__}: {error}"


class Model(_BaseModel):
    """A model behind the native API.

    >>> Model("yandexgpt", folder_id="b1g0").configure(temperature=0.5).uri
    'gpt://b1g0/yandexgpt/latest'
    """

    _call = "run"

    def _encode(self, messages: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        config = self.config
        how, value = _tool_choice(config.tool_choice) if config.tool_choice else ("", None)
        tools = [{"function": tool._to_json()} for tool in config.tools or ()]
        options = {"stream": stream, **self._options()}
        return {**_given(
            modelUri=self.uri, completionOptions=options, **self._answer_format(),
            messages=[self._encode_message(i, m) for i, m in enumerate(messages)],
            tools=tools or None, parallelToolCalls=config.parallel_tool_calls,
            toolChoice={"mode" if how == "mode" else "functionName": value} if how else None,
        ), **(config.extra_query or {})}

    def _options(self) -> dict[str, Any]:
        tokens, mode = self.config.max_tokens, self.config.reasoning_mode
        return _given(
            temperature=self.config.temperature, maxTokens=None if tokens is None else str(tokens),
            reasoningOptions=mode and {"mode": mode.upper()},
        )

    def _answer_format(self) -> dict[str, Any]:
        if self.config.response_format is None:
            return {}
        _, schema, _ = _format_schema(self.config.response_format)
        return {"jsonObject": True} if schema is None else {"jsonSchema": {"schema": schema}}

    def _encode_message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        if "tool_calls" in message:
            calls = [{"functionCall": {"name": call.name, "arguments": call.arguments}}
                     for call in message["tool_calls"]]
            return {"role": message["role"], "toolCallList": {"toolCalls": calls}}
        if "tool_results" in message:
            results = [{"functionResult": {"name": item["name"], "content": item["content"]}}
                       for item in message["tool_results"]]
            return {"role": "user", "toolResultList": {"toolResults": results}}
        if "text" not in message:
            raise TypeError(f"messages[{index}]: content parts and tool_call_id are for ChatModel")
        return message

    def _decode(self, answer: Any, sent: Sequence[Any], request_id: str | None) -> Result:
        result = answer["result"]
        usage = result.get("usage") or {}
        details = usage.get("completionTokensDetails") or {}
        alternatives = tuple([self._alternative(item) for item in result["alternatives"]])
        return Result(
            alternatives,
            Usage(_integer(usage.get("inputTextTokens")), _integer(usage.get("completionTokens")),
                  _integer(usage.get("totalTokens")), _integer(details.get("reasoningTokens"))),
            _string(result, "modelVersion", ""), alternatives[0].text, request_id, answer, sent,
            self.config.response_format,
        )

    def _alternative(self, item: Any) -> Alternative:
        message, status = item["message"], item.get("status") or ""
        calls = (message.get("toolCallList") or {}).get("toolCalls") or ()
        calls = [call["functionCall"] for call in calls]
        return Alternative(
            _string(message, "role", "assistant"), _string(message, "text", ""),
            Status.__members__.get(status[len("ALTERNATIVE_STATUS_"):], Status.UNSPECIFIED),
            tuple([ToolCall(_string(call, "name"), dict(call.get("arguments") or {})) for call in calls])
            or None,
        )

    def _read(self, lines: _Lines, sent: Sequence[Any]) -> Iterator[Result]:
        before = ""
        for line in lines:
            if not line.strip():
                continue
            event = lines.event(line)
            result = _checked(self._decode, event, sent, lines.request_id)
            text = result.text
            delta = text[len(before):] if text.startswith(before) else text
            object.__setattr__(result, "delta", delta)  # nobody has seen it yet
            before = text
            status = event["result"]["alternatives"][0].get("status") or "_UNSPECIFIED"
            if not status.endswith(("_PARTIAL", "_UNSPECIFIED")):
                lines.end()
                yield result
                return lines.drain()
            yield result
        raise StreamInterrupted("the stream ended, but the model did not: its last status is not final")

    def tokenize(self, messages: Messages, *, timeout: float | None = 60) -> tuple[Token, ...]:
        """The tokens of a request as billing counts them, the chat template's included.

        API: POST /foundationModels/v1/tokenizeCompletion.
        """
        def read(answer: Any, headers: Any) -> tuple[Token, ...]:
            return tuple([Token(_integer(t.get("id")), _string(t, "text", ""), bool(t.get("special")))
                          for t in answer["tokens"]])

        body = self._encode(_normalize(messages), stream=False)
        return _client(self.client).request("tokenize", body, _Deadline(timeout), read)

    def run_deferred(self, messages: Messages, *, timeout: float | None = 60) -> Operation[Result]:
        """Leave a request with the service; it is answered later, and cheaper.

        Any process can collect the answer within three days: `attach_deferred(operation.id)`.
        Never sent again when the service may have it; the exception says whether it may.
        API: POST /foundationModels/v1/completionAsync.
        """
        body = self._encode(_normalize(messages), stream=False)
        answer = _client(self.client).request("run_deferred", body, _Deadline(timeout), _operation)
        return self.attach_deferred(answer["id"])

    def attach_deferred(self, operation_id: str, *, timeout: float | None = 60) -> Operation[Result]:
        """The operation of an earlier `run_deferred`. Nothing is sent."""
        _Deadline(timeout)
        return Operation(_check_id("operation_id", operation_id), _DEFERRED, self.client, self._deferred)

    def _deferred(self, response: Any, deadline: _Deadline) -> Result:
        return _checked(self._decode, {"result": response}, (), None)

    def tune_deferred(self, train_datasets: Any, *, validation_datasets: Any = None,
                      name: str | None = None, description: str | None = None,
                      labels: Mapping[str, str] | None = None, seed: int | None = None,
                      lr: float | None = None, n_samples: int | None = None,
                      additional_arguments: str | None = None, tuning_type: Lora | PromptTune | None = None,
                      scheduler: LinearScheduler | CosineScheduler | ConstantScheduler | None = None,
                      optimizer: AdamW | None = None, timeout: float | None = 60) -> Operation[Model]:
        """Start tuning this model; the result is the tuned one, with this config.

        Datasets: a Dataset, an id, a `pathlib.Path` of JSON Lines (uploaded first), `(dataset,
        weight)`, an iterable of these, or `{dataset: weight}`. `lr`: learning rate. `timeout` is
        for each request. Never sent again when the service may have it. API: TuningService/Tune.
        """
        _Deadline(timeout)
        train = _weighted("train_datasets", train_datasets)
        validation = _weighted("validation_datasets", validation_datasets) if validation_datasets else []
        parameters = _given(
            seed=seed, lr=lr, nSamples=n_samples, additionalArguments=additional_arguments,
            **_tuning_parameters(tuning_type=tuning_type, scheduler=scheduler, optimizer=optimizer))
        body = _given(
            baseModelUri=self.uri, trainDatasets=self._uploaded(train, timeout),
            validationDatasets=self._uploaded(validation, timeout) or None, name=name,
            description=description, labels=labels and dict(labels), textToTextCompletion=parameters)
        answer = _client(self.client).request("TuningService/Tune", body, _Deadline(timeout), _operation)
        task_id = (answer.get("metadata") or {}).get("tuningTaskId")
        return Operation(task_id or answer["id"], _TUNING, self.client, self._tuned, answer["id"])

    def tune(self, train_datasets: Any, *, timeout: float | None = 60, poll_timeout: float | None = 259200,
             poll_interval: float | None = 60, **parameters: Any) -> Model:
        """`tune_deferred` with its parameters, then `wait`: the tuned model, hours later."""
        operation = self.tune_deferred(train_datasets, timeout=timeout, **parameters)
        return operation.wait(timeout=timeout, poll_timeout=poll_timeout, poll_interval=poll_interval)

    def attach_tune_deferred(self, task_id: str, *, timeout: float | None = 60) -> Operation[Model]:
        """The operation of an earlier `tune_deferred`. API: TuningService/Describe."""
        body = {"tuningTaskId": _check_id("task_id", task_id)}
        try:
            read = lambda answer, _: answer["tuningTask"].get("operationId")  # noqa: E731
            operation_id = _client(self.client).request(
                "TuningService/Describe", body, _Deadline(timeout), read)
        except NotFoundError:  # the id may be the operation's own
            operation_id = None
        return Operation(task_id, _TUNING, self.client, self._tuned, operation_id)

    def _tuned(self, response: Any, deadline: _Deadline) -> Model:
        return self._with(uri=_checked(_string, response, "targetModelUri"))

    def batch_deferred(self, dataset: Any, *, timeout: float | None = 60) -> Operation[Dataset]:
        """Ask the model about each row of a dataset (a Dataset, an id, or a `pathlib.Path`, which
        is uploaded first); the result is a Dataset of the answers.

        temperature, max_tokens, reasoning_mode and response_format count. Never sent again when
        the service may have it. API: TextGenerationBatchService/Completion.
        """
        _Deadline(timeout)
        weighted = _weighted("dataset", dataset)
        if len(weighted) > 1:
            raise TypeError("dataset is one dataset")
        source = self._uploaded(weighted, timeout)[0]["datasetId"]
        body = {"modelUri": self.uri, "sourceDatasetId": source, "completionOptions": self._options(),
                **self._answer_format()}
        client = _client(self.client)
        answer = client.request("TextGenerationBatchService/Completion", body, _Deadline(timeout), _operation)
        if not (answer.get("metadata") or {}).get("taskId"):
            answer = client.request("OperationService/Get", {"operationId": answer["id"]}, _Deadline(timeout))
        return self.attach_batch_deferred(_checked(lambda: _string(answer["metadata"], "taskId")))

    def batch(self, dataset: Any, *, timeout: float | None = 60, poll_timeout: float | None = 259200,
              poll_interval: float | None = 60) -> Dataset:
        """`batch_deferred`, then `wait`: the Dataset of the answers, hours later."""
        operation = self.batch_deferred(dataset, timeout=timeout)
        return operation.wait(timeout=timeout, poll_timeout=poll_timeout, poll_interval=poll_interval)

    def attach_batch_deferred(self, task_id: str, *, timeout: float | None = 60) -> Operation[Dataset]:
        """The operation of an earlier `batch_deferred`. Nothing is sent."""
        _Deadline(timeout)
        return Operation(_check_id("task_id", task_id), _BATCH, self.client, self._answers)

    def _answers(self, response: Any, deadline: _Deadline) -> Dataset:
        return Dataset._describe(_checked(_string, response, "resultDatasetId"), self.client, deadline)

    def _uploaded(self, weighted: list[tuple[Any, float]], timeout: float | None) -> list[dict[str, Any]]:
        def id_of(source: Any) -> str:
            uploaded = Dataset.upload(source, client=self.client, timeout=timeout)
            return uploaded.id

        return [{"datasetId": s if isinstance(s, str) else id_of(s), "weight": w} for s, w in weighted]


# --- ChatModel ------------------------------------------------------------------------------------

_FINISH = {"stop": Status.FINAL, "length": Status.TRUNCATED_FINAL, "tool_calls": Status.TOOL_CALLS,
           "content_filter": Status.CONTENT_FILTER}


class _Choice:
    """A choice of a streamed answer, as it grows."""

    def __init__(self) -> None:
        self.role, self.text, self.finish = "assistant", "", ""
        self.thought: str | None = None
        self.calls: list[dict[str, Any]] = []

    def alternative(self) -> Alternative:
        return _quick(Alternative, role=self.role, text=self.text, status=Status.PARTIAL, tool_calls=None,
                      reasoning_text=self.thought)

    def whole(self) -> dict[str, Any]:
        """As it would stand in an answer that is not streamed."""
        message = {"role": self.role, "content": self.text, "reasoning_content": self.thought,
                   "tool_calls": self.calls}
        return {"message": message, "finish_reason": self.finish}

    def call(self, piece: Mapping[str, Any], at: int) -> None:
        """Add a piece of a tool call: its first has the id, all have some of name or arguments."""
        while at >= len(self.calls):
            self.calls.append({"id": "", "function": {"name": "", "arguments": ""}})
        call, function = self.calls[at], piece.get("function") or {}
        call["id"] = call["id"] or piece.get("id")
        for key in ("name", "arguments"):
            call["function"][key] += function.get(key) or ""


class _Choices(dict[int, _Choice]):
    """All choices of a streamed answer by their index; `done` once `wanted` of them have ended."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted, self.done = wanted, False

    def add(self, event: Any) -> str | None:
        """The first choice's new text, None when nothing was said."""
        said = None
        for item in event.get("choices") or ():
            index, delta = item.get("index") or 0, item.get("delta") or {}
            choice = self.get(index) or self.setdefault(index, _Choice())
            text, thought = delta.get("content"), delta.get("reasoning_content")
            if delta.get("role"):
                choice.role = delta["role"]
            if text:
                choice.text += text
            if thought:
                choice.thought = (choice.thought or "") + thought
            if text or thought:
                said = (said or "") + (text or "" if index == 0 else "")
            for place, piece in enumerate(delta.get("tool_calls") or ()):
                choice.call(piece, piece.get("index", place))
            if item.get("finish_reason"):
                choice.finish = item["finish_reason"]
                self.done = len([True for choice in self.values() if choice.finish]) >= self.wanted
        return said


class ChatModel(_BaseModel):
    """A model behind the OpenAI-compatible API: Qwen, gpt-oss, Gemma, YandexGPT and others.

    >>> ChatModel("gpt-oss-120b", folder_id="b1g0").uri
    'gpt://b1g0/gpt-oss-120b/latest'
    """

    _call = "chat"

    def _encode(self, messages: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        config, mode = self.config, self.config.reasoning_mode
        how, value = _tool_choice(config.tool_choice) if config.tool_choice else ("", "")
        tools = [{"type": "function", "function": tool._to_json()} for tool in config.tools or ()]
        choice = value.lower() if how == "mode" else {"type": "function", "function": {"name": value}}
        return {**_given(
            model=self.uri, messages=self._encode_messages(messages), stream=stream,
            temperature=config.temperature, max_tokens=config.max_tokens, tools=tools or None,
            reasoning_effort=mode and mode.lower(), response_format=self._answer_format(),
            parallel_tool_calls=config.parallel_tool_calls, tool_choice=choice if how else None,
        ), **(config.extra_query or {})}

    def _answer_format(self) -> dict[str, Any] | None:
        if self.config.response_format is None:
            return None
        name, schema, strict = _format_schema(self.config.response_format)
        if schema is None:
            return {"type": "json_object"}
        if not name:
            raise ConfigError("this API needs a name: response_format={'json_schema': …, 'name': 'City'}")
        return {"type": "json_schema", "json_schema": _given(name=name, schema=schema, strict=strict)}

    def _encode_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        encoded: list[dict[str, Any]] = []
        open_calls: list[tuple[str, str]] = []  # name and id of those without a result so far
        for index, message in enumerate(messages):
            if "tool_calls" in message:
                calls = [(c, c.id or f"call_{index}_{n}") for n, c in enumerate(message["tool_calls"])]
                open_calls = [(call.name, id) for call, id in calls]
                encoded.append({"role": message["role"], "content": message["text"], "tool_calls": [
                    {"id": id, "type": "function", "function": {
                        "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
                    for call, id in calls]})
            elif "tool_results" in message:
                for item in message["tool_results"]:
                    fits = [c for c in open_calls if c == (item["name"], item.get("tool_call_id", c[1]))]
                    if not fits:
                        raise ConfigError(f"messages[{index}]: no call of {item['name']!r} waits for "
                                          "a result")
                    open_calls.remove(fits[0])
                    encoded.append({"role": "tool", "tool_call_id": fits[0][1], "content": item["content"]})
            elif "tool_call_id" in message:
                encoded.append({"role": "tool", **message})
            else:
                text = message.get("text", message.get("content"))
                encoded.append({"role": message["role"], "content": text})
        return encoded

    def _decode(self, answer: Any, sent: Sequence[Any], request_id: str | None) -> Result:
        choices = [(choice["message"], choice.get("finish_reason")) for choice in answer["choices"]]
        alternatives = [
            Alternative(
                _string(message, "role", "assistant"), _string(message, "content", ""),
                _FINISH.get(finish or "", Status.UNSPECIFIED),
                tuple(map(_tool_call, message.get("tool_calls") or ())) or None,
                message.get("reasoning_content") or None)
            for message, finish in choices]
        usage = answer.get("usage")
        details = (usage and usage.get("completion_tokens_details")) or {}
        tokens = usage and Usage(
            _integer(usage.get("prompt_tokens")), _integer(usage.get("completion_tokens")),
            _integer(usage.get("total_tokens")), _integer(details.get("reasoning_tokens")))
        return Result(tuple(alternatives), tokens or None, _string(answer, "model", ""),
                      alternatives[0].text, request_id, answer, sent, self.config.response_format)

    def _read(self, lines: _Lines, sent: Sequence[Any]) -> Iterator[Result]:
        choices = _Choices((self.config.extra_query or {}).get("n") or 1)
        event: dict[str, Any] = {}
        usage = None
        for event in lines.events():
            usage = event.get("usage") or usage
            said = _checked(choices.add, event)
            if said is not None:
                grown = tuple([choice.alternative() for choice in choices.values()])
                yield _quick(Result, alternatives=grown, usage=None, model_version=event.get("model") or "",
                             delta=said, request_id=lines.request_id, raw=event, _sent=sent,
                             _format=self.config.response_format)
            if choices.done:
                lines.end()  # but for the usage and [DONE], which may follow
        if not choices.done:
            raise StreamInterrupted("the stream ended, but the model did not: no finish_reason came")
        answer = {**event, "usage": usage, "choices": [choice.whole() for choice in choices.values()]}
        yield replace(_checked(self._decode, answer, sent, lines.request_id), delta="")

    @classmethod
    def list(cls, *, folder_id: str | None = None, auth: Any = None, client: ClientConfig | None = None,
             timeout: float | None = 60) -> tuple[ChatModel, ...]:
        """The models of this API. API: GET /v1/models."""
        client = _settle(client, folder_id, auth)

        def read(answer: Any, headers: Any) -> tuple[ChatModel, ...]:
            ids = [_string(model, "id") for model in answer["data"]]
            return tuple([cls(id, client=client) for id in ids if id.startswith("gpt://")])

        return _client(client).request("models", None, _Deadline(timeout), read)


# --- Operation ------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class OperationStatus(_Value):
    """How an operation stands; `error` is {"code", "message", "details"}."""

    done: bool
    error: Mapping[str, Any] | None = None
    response: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    created_at: datetime | None = None
    modified_at: datetime | None = None

    @property
    def is_running(self) -> bool:
        return not self.done

    @property
    def is_finished(self) -> bool:
        return self.done

    @property
    def is_succeeded(self) -> bool:
        return self.done and not self.error and self.response is not None

    @property
    def is_failed(self) -> bool:
        return self.done and not self.is_succeeded

    @property
    def status_name(self) -> str:
        return "running" if not self.done else "succeeded" if self.is_succeeded else "failed"

    @property
    def progress(self) -> float | None:
        """0 to 1 by steps, rows or batches; None where the service counts none."""
        metadata = self.metadata or {}
        for now, total in (("currentStep", "totalSteps"), ("processedRows", "totalRows"),
                           ("completedBatches", "totalBatches")):
            with suppress(TypeError, ValueError, ZeroDivisionError):
                return min(1.0, _integer(metadata.get(now)) / _integer(metadata.get(total)))
        return None


class _Kind(NamedTuple):
    """What differs between operations: names in _CALLS, limits in seconds, words."""

    name: str
    get: str
    cancel: str
    key: str  # of the id in the request
    poll_timeout: float
    slowest_poll: float
    attach: str  # how another process takes it up
    forgotten: str  # what a 404 means


_DEFERRED = _Kind(
    "deferred run", "operation", "cancel_operation", "id", 3600, 10, "attach_deferred",
    "The service keeps deferred runs for three days")
_TUNING = _Kind(
    "tuning", "OperationService/Get", "OperationService/Cancel", "operationId", 259200, 60,
    "attach_tune_deferred", "There is no such tuning, or it was deleted")
_BATCH = _Kind(
    "batch", "BatchInferenceService/Describe", "BatchInferenceService/Cancel", "taskId", 259200, 60,
    "attach_batch_deferred", "There is no such batch, or it was deleted")
_VALIDATION = _Kind(
    "validation", "OperationService/Get", "OperationService/Cancel", "operationId", 21600, 10, "Dataset.get",
    "The validation is forgotten; Dataset.get(id).status tells how it ended")
_TRANSIENT: tuple[type[YandexGPTError], ...] = (
    ConnectionFailed, DeadlineExceeded, RateLimitError, ServerError, InvalidResponse)


class Operation(Generic[_T]):
    """Work that the service does later. It pickles, so that any process can wait for it.

    `id` is what the matching `attach_…` takes.
    """

    def __init__(self, id: str, kind: _Kind, client: ClientConfig, parse: Callable[[Any, _Deadline], _T],
                 service_id: str | None = None) -> None:
        self.id = id
        self.client = client
        self._kind = kind
        self._parse = parse
        self._service_id = service_id or id  # the operation's own, which for a tuning is another

    def __repr__(self) -> str:
        return f"<{self._kind.name} {self.id}>"

    @property
    def task_id(self) -> str:
        """The task of a tuning or batch."""
        return self.id

    def get_status(self, *, timeout: float | None = 60) -> OperationStatus:
        """Ask once. API: GET /operations/<id>; OperationService/Get for tuning and validation,
        BatchInferenceService/Describe for batches."""
        return self._status(_Deadline(timeout))

    def _status(self, deadline: _Deadline) -> OperationStatus:
        try:
            return _checked(_operation_status, self._ask(self._kind.get, deadline))
        except NotFoundError:
            if self._kind is not _TUNING and self._kind.name != "tuning":
                raise
            # operations are forgotten after two weeks or so, tunings are not
            return _checked(_operation_status, self._ask("TuningService/Describe", deadline))

    def _ask(self, call: str, deadline: _Deadline) -> Any:
        key, id = self._kind.key, self._service_id
        if call in ("TuningService/Describe", "TuningService/GetMetricsUrl"):
            key, id = ("tuningTaskId" if call == "TuningService/Describe" else "taskId"), self.id
        body = None if key == "id" else {key: id}
        try:
            return _client(self.client).request(call, body, deadline, id=id)
        except YandexGPTError as error:
            error.operation_id = self.id
            if isinstance(error, NotFoundError):
                error._add(self._kind.forgotten)
            raise

    def get_result(self, *, timeout: float | None = 60) -> _T:
        """The result of a finished operation. Raises OperationNotReady while it runs, and
        OperationError when it failed, was cancelled, or ended with nothing."""
        deadline = _Deadline(timeout)
        return self._result(self._status(deadline), deadline)

    def _result(self, status: OperationStatus, deadline: _Deadline) -> _T:
        if not status.done:
            raise OperationNotReady(f"{self!r} still runs: use wait()", operation_id=self.id)
        if status.is_succeeded:
            try:
                return self._parse(status.response, deadline)
            except YandexGPTError as error:
                error.operation_id = self.id
                raise
        error_ = status.error or {"message": "it has neither a response nor an error"}
        code, message = _grpc_name(error_.get("code")) or "UNKNOWN", str(error_.get("message") or "")
        raise OperationError(f"{self!r} ended with {code}: {message}", code=code, message=message,
                             details=error_.get("details") or (), operation_id=self.id)

    def wait(self, *, timeout: float | None = 60, poll_timeout: float | None = None,
             poll_interval: float | None = None,
             on_status: Callable[[OperationStatus], object] | None = None) -> _T:
        """Poll until it is done, and give the result. A failed poll does not end it.

        `timeout` is for each poll. `poll_timeout` None: an hour, for a validation 6, for tuning
        and batches 72. `poll_interval` None: 0.5 s, growing by half to 10 s, for tuning and
        batches to 60 s. `on_status` is called with each status. Raises what `get_result` does,
        and PollTimeout. Ctrl-C leaves the operation running.
        """
        end = _Deadline(self._kind.poll_timeout if poll_timeout is None else poll_timeout)
        pause = 0.5 if poll_interval is None else poll_interval
        _check_seconds("poll_interval", pause)
        try:
            while True:
                status = failure = None
                try:
                    deadline = end.within(timeout)
                    status = self._status(deadline)
                    if on_status is not None:
                        on_status(status)
                    if status.done:
                        return self._result(status, deadline)
                except _TRANSIENT as error:
                    if status is not None and isinstance(error, InvalidResponse):
                        raise  # a broken result stays broken
                    failure = error
                    _log.warning("a poll of %r failed, and is tried again: %s", self, error)
                end.sleep(pause)
                if end.over():
                    raise PollTimeout(
                        f"{self!r} still runs: go on with error.operation.wait(), or in another process "
                        f"with {self._kind.attach}({self.id!r})", operation_id=self.id, operation=self,
                    ) from failure
                pause = min(1.5 * pause, self._kind.slowest_poll) if poll_interval is None else pause
        except KeyboardInterrupt:
            _log.warning("%r goes on; take it up with %s(%r)", self, self._kind.attach, self.id)
            raise

    def cancel(self, *, timeout: float | None = 60) -> None:
        """Ask the service to stop it; `get_status` tells when it has."""
        self._ask(self._kind.cancel, _Deadline(timeout))

    def metrics_url(self, *, timeout: float | None = 60) -> str | None:
        """Where a tuning's metrics are; None until there are any. API: TuningService/GetMetricsUrl."""
        try:
            return self._ask("TuningService/GetMetricsUrl", _Deadline(timeout)).get("loadUrl") or None
        except NotFoundError:
            return None


def _operation_status(answer: Any) -> OperationStatus:
    task = answer.get("task") or answer.get("tuningTask")
    if task:  # a description instead of an operation: its status alone decides
        state, errors = task.get("status"), task.get("errors") or {}
        details = [*(errors.get("lineErrors") or ()), *(errors.get("batchErrors") or ())]
        said = (errors.get("status") or {}).get("message") or "; ".join(
            f"line {e.get('lineNumber', e.get('firstLine'))}: {e.get('message')}" for e in details[:5])
        failed = {"code": 1 if state == "CANCELED" else 13, "message": said or f"the task is {state}",
                  "details": details}
        answer = {"done": state in ("COMPLETED", "FAILED", "CANCELED"), "metadata": task,
                  "createdAt": task.get("createdAt"), "modifiedAt": task.get("finishedAt"),
                  **({"response": task} if state == "COMPLETED" else {"error": failed})}
    done = bool(answer.get("done"))
    for key in ("error", "response", "metadata"):
        dict(answer.get(key) or {})
    return OperationStatus(
        done, answer.get("error") if done else None, answer.get("response"), answer.get("metadata"),
        _moment(answer.get("createdAt")), _moment(answer.get("modifiedAt")))


def _operation(answer: Any, headers: Any) -> Any:
    _check_id("id", answer["id"])
    return answer


def _moment(value: str | None) -> datetime | None:
    """An RFC 3339 time; its fraction of a second may have nine digits."""
    if not value:
        return None
    whole, _, fraction = value.rstrip("Z").partition(".")
    moment = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    return moment.replace(microsecond=int(fraction[:6].ljust(6, "0")))


# --- Datasets and tuning parameters ---------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Lora(_Value):
    """Tuning of low-rank adapters."""

    rank: int | None = None
    alpha: float | None = None
    initialization: str | None = None
    type: str | None = None


@dataclass(frozen=True, repr=False, eq=False)
class PromptTune(_Value):
    """Tuning of virtual tokens before the prompt."""

    virtual_tokens: int | None = None


@dataclass(frozen=True, repr=False, eq=False)
class LinearScheduler(_Value):
    """A learning rate that falls to `min_lr` in a line."""

    min_lr: float | None = None
    warmup_ratio: float | None = None


@dataclass(frozen=True, repr=False, eq=False)
class CosineScheduler(_Value):
    """A learning rate that falls to `min_lr` like a cosine."""

    min_lr: float | None = None
    warmup_ratio: float | None = None


@dataclass(frozen=True, repr=False, eq=False)
class ConstantScheduler(_Value):
    """A learning rate that stays as it is after the warm-up."""

    warmup_ratio: float | None = None


@dataclass(frozen=True, repr=False, eq=False)
class AdamW(_Value):
    """The optimizer AdamW."""

    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None


_TUNING_FIELDS: dict[str, dict[type[Any], str]] = {
    "tuning_type": {Lora: "lora", PromptTune: "promptTune"},
    "scheduler": {LinearScheduler: "linear", CosineScheduler: "cosine", ConstantScheduler: "constant"},
    "optimizer": {AdamW: "adamw"},
}


def _tuning_parameters(**values: Any) -> dict[str, Any]:
    """Their part of the request, as the oneofs of TextToTextCompletionTuningParams."""
    body: dict[str, Any] = {}
    for what, value in _given(**values).items():
        kinds = _TUNING_FIELDS[what]
        if type(value) not in kinds:
            raise TypeError(f"{what} is {' or '.join(k.__name__ for k in kinds)}, not {value!r}")
        given = _given(**{re.sub("_(.)", lambda m: m[1].upper(), f.name): getattr(value, f.name)
                          for f in fields(value)})
        warmup = {"warmupRatio": given.pop("warmupRatio")} if "warmupRatio" in given else {}
        part = {kinds[type(value)]: given, **warmup}
        body.update(part if what == "tuning_type" else {what: part})
    return body


def _weighted(what: str, value: Any) -> list[tuple[str | Path, float]]:
    """Datasets of any accepted form as (id or path, weight); files are checked, not yet uploaded."""
    def is_pair(item: Any) -> bool:
        return isinstance(item, tuple) and len(item) == 2 and type(item[1]) in (int, float)

    if isinstance(value, Mapping):
        value = list(value.items())
    elif isinstance(value, (str, Path, Dataset)) or is_pair(value) or not isinstance(value, Iterable):
        value = [value]
    found: list[tuple[str | Path, float]] = []
    for item in value:
        source, weight = item if is_pair(item) else (item, 1.0)
        if not isinstance(source, (str, Path, Dataset)):
            raise TypeError(f"{what}: expected a Dataset, an id, a pathlib.Path, (dataset, weight), an "
                            f"iterable of these or {{dataset: weight}}, not {item!r}")
        _check_seconds(f"{what}: the weight", weight)
        if isinstance(source, Path):
            _check_rows(source)
        else:
            source = _check_id(f"{what}: the id", getattr(source, "id", source))
        found.append((source, float(weight)))
    if not found:
        raise ConfigError(f"{what} is empty")
    return found


_LONGEST_ROW = 8 << 20  # bytes: rows are checked in constant memory


def _check_rows(path: Path) -> None:
    """ConfigError, which names the line, unless the file begins and ends as JSON Lines do: its
    first 4 MiB are parsed, all of most files. What is between, the service's validation is for."""
    try:
        with path.open("rb") as file:
            number = rows = 0
            while file.tell() < 4 << 20:
                line = file.readline(_LONGEST_ROW + 2)
                if not line:
                    break
                number += 1
                rows += _check_row(f"{path}, line {number}", line)
            if file.read(1):
                file.seek(-(1 << 16), os.SEEK_END)
                _, found, last = file.read().rstrip().rpartition(b"\n")
                _check_row(f"{path}, the last line", last if found else b"")  # a file cut short
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not rows:
        raise ConfigError(f"{path} is empty")


def _check_row(where: str, line: bytes) -> bool:
    """False for a blank line."""
    try:
        if len(line.rstrip(b"\r\n")) > _LONGEST_ROW:
            raise ValueError("is longer than 8 MiB")
        row = json.loads(line) if line.strip() else {}
        if not isinstance(row, dict):
            raise ValueError("is no object such as {\"request\": [messages], \"response\": text}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a row of JSON Lines: {error}") from error
    return bool(line.strip())


@dataclass(frozen=True, repr=False, eq=False)
class Dataset(_Value):
    """Data at the service: to tune with, to ask about in a batch, or a batch's answers.

    `status` is DRAFT, VALIDATING, READY, INVALID or DELETING.
    """

    id: str
    folder_id: str = ""
    name: str = ""
    description: str = ""
    task_type: str = ""
    status: str = ""
    rows_count: int = 0
    size_bytes: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created_by: str = ""
    _config: ClientConfig = field(default_factory=ClientConfig, repr=False, compare=False)

    @classmethod
    def upload(cls, source: str | Path | Iterable[Mapping[str, Any]], *,
               task_type: str = "TextToTextGeneration", name: str | None = None,
               description: str | None = None, labels: Mapping[str, str] | None = None,
               allow_data_logging: bool | None = None, upload_format: str = "jsonlines",
               wait: bool = True, on_status: Callable[[OperationStatus], object] | None = None,
               client: ClientConfig | None = None, timeout: float | None = 60,
               upload_timeout: float | None = 3600) -> Dataset:
        """Upload a file of JSON Lines (its path), or dicts, and have the service validate it.

        A row is {"request": [messages], "response": text}, for a batch without the response.
        Memory stays constant; over 100 MiB go in parts, each retried by itself. `timeout` is for
        each request, `upload_timeout` for all the data. Without `wait` it returns before the
        validation ends. A failed upload leaves nothing behind; invalid data stays for a look, and
        raises DatasetValidationError. API: DatasetService Create, GetUploadDraftUrl, Validate.
        """
        import tempfile

        client = _settle(client)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(source) if isinstance(source, (str, os.PathLike)) else Path(folder, "rows.jsonl")
            if not isinstance(source, (str, os.PathLike)):
                with path.open("wb") as file:
                    file.writelines(_encoded(row) + b"\n" for row in source)
            if upload_format == "jsonlines":
                _check_rows(path)
            body = _given(folderId=client.folder_id, name=name or path.stem, description=description,
                          labels=labels and dict(labels), taskType=task_type,
                          uploadFormat=upload_format, allowDataLog=allow_data_logging)
            api = _client(client)
            id = api.request("DatasetService/Create", body, _Deadline(timeout),
                             lambda answer, _: _string(answer, "datasetId"))
            draft = {"datasetId": id}
            try:
                _put(api, draft, path, timeout, _Deadline(upload_timeout))
                started = api.request("DatasetService/Validate", draft, _Deadline(timeout), _operation)
            except BaseException:
                try:
                    api.request("DatasetService/Delete", draft, _Deadline(timeout))
                except YandexGPTError as error:
                    _log.warning("the draft %s could not be deleted: %s", id, error)
                raise
        validation = Operation(started["id"], _VALIDATION, client, partial(_validated, id, client))
        if wait:
            return validation.wait(timeout=timeout, on_status=on_status)
        return cls.get(id, client=client, timeout=timeout)

    @classmethod
    def get(cls, id: str, *, client: ClientConfig | None = None, timeout: float | None = 60) -> Dataset:
        """API: DatasetService/Describe."""
        return cls._describe(_check_id("id", id), client or ClientConfig(), _Deadline(timeout))

    @classmethod
    def _describe(cls, id: str, client: ClientConfig, deadline: _Deadline) -> Dataset:
        return _client(client).request("DatasetService/Describe", {"datasetId": id}, deadline,
                                       lambda answer, _: cls._of(answer["dataset"], client))

    @classmethod
    def _of(cls, info: Any, client: ClientConfig) -> Dataset:
        texts = {name: str(info.get(key) or "") for name, key in (
            ("folder_id", "folderId"), ("name", "name"), ("description", "description"),
            ("task_type", "taskType"), ("status", "status"))}
        return cls(
            _check_id("datasetId", info["datasetId"]), rows_count=_integer(info.get("rows")),
            size_bytes=_integer(info.get("sizeBytes")), created_at=_moment(info.get("createdAt")),
            updated_at=_moment(info.get("updatedAt")), labels=dict(info.get("labels") or {}),
            created_by=info.get("createdBy") or info.get("createdById") or "", _config=client, **texts)

    @classmethod
    def list(cls, *, client: ClientConfig | None = None, name: str | None = None,
             task_type: str | None = None, status: str | None = None,
             timeout: float | None = 60) -> tuple[Dataset, ...]:
        """The folder's datasets, all pages of them. API: DatasetService/List."""
        client, deadline, page = _settle(client), _Deadline(timeout), ""
        found: tuple[Dataset, ...] = ()
        body = _given(folderId=client.folder_id, datasetNamePattern=name, pageSize="100",
                      taskTypeFilter=task_type and [task_type], status=status and [status.upper()])
        while True:
            body["pageToken"] = page
            answer: Any = _client(client).request("DatasetService/List", body, deadline)
            found += tuple([_checked(cls._of, info, client) for info in answer.get("datasets") or ()])
            if answer.get("nextPageToken") in (None, "", page):
                return found
            page = answer["nextPageToken"]

    def delete(self, *, timeout: float | None = 60) -> None:
        """API: DatasetService/Delete."""
        _client(self._config).request("DatasetService/Delete", {"datasetId": self.id}, _Deadline(timeout))

    def download(self, path: str | Path, *, timeout: float | None = 3600) -> tuple[Path, ...]:
        """Save its files, mostly Parquet, and give their paths. `path`: a folder that exists, for
        files under their own names, or else the name of the one file.

        API: DatasetService/GetDownloadUrls, then GET.
        """
        target, deadline = Path(path), _Deadline(timeout)
        files = self._files(deadline)
        if len(files) != 1 and not target.is_dir():
            raise ConfigError(f"the dataset has {len(files)} files, and {target} is no folder")
        saved = [target / name if target.is_dir() else target for name, _ in files]
        for file, (_, url) in zip(saved, files):
            _client(self._config).download(url, file, deadline)
        return tuple(saved)

    def _files(self, deadline: _Deadline) -> Sequence[tuple[str, str]]:
        """Name and pre-signed URL of each file, in the order of its rows."""
        def read(answer: Any, headers: Any) -> Any:
            files = [(re.split(r"[/\\]", u["key"])[-1], _string(u, "url")) for u in answer["downloadUrls"]]
            files.sort(key=lambda f: [int(digits) for digits in re.findall(r"\d+", f[0])])
            if {"", ".", ".."} & {name for name, _ in files}:
                raise ValueError("no name of a file")
            return files

        body = {"datasetId": self.id}
        return _client(self._config).request("DatasetService/GetDownloadUrls", body, deadline, read)

    def rows(self, *, timeout: float | None = 3600) -> Iterator[dict[str, Any]]:
        """Its rows, one at a time, by way of a temporary file.

        The service stores Parquet, whatever was uploaded. Without the package pyarrow (extra
        `parquet`) that raises ImportError, and `download` is the way.
        """
        import tempfile

        deadline = _Deadline(timeout)
        for name, url in self._files(deadline):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, name)
                _client(self._config).download(url, path, deadline.within(None))
                yield from _rows_of(path)


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            file.seek(0)
            yield from (_checked(lambda text: dict(json.loads(text)), line) for line in file if line.strip())
            return
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("the rows are Parquet: pip install pyarrow, or use Dataset.download") from error
    with parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(1000):
            yield from batch.to_pylist()


def _validated(id: str, client: ClientConfig, response: Any, deadline: _Deadline) -> Dataset:
    """What becomes of a finished validation: the dataset, or DatasetValidationError."""
    if response.get("isValid"):
        return Dataset._describe(id, client, deadline)
    errors = _checked(lambda: tuple([
        {"name": e.get("error"), "description": e.get("errorDescription"),
         "rows": [*map(_integer, e.get("rowNumbers") or ())]} for e in response.get("errors") or ()]))
    shown = "; ".join(f"{e['name']} ({e['description']}), rows {e['rows'][:10]}" for e in errors[:5])
    raise DatasetValidationError(f"dataset {id} is invalid: {shown}. Correct the file and upload it again; "
                                 "this dataset stays until you delete it", dataset_id=id, errors=errors)


_PART = 100 << 20  # bytes


def _put(api: _Client, draft: dict[str, str], path: Path, timeout: float | None, deadline: _Deadline) -> None:
    """Send a file to the store: whole, or over 100 MiB in parts, four at a time."""
    from concurrent.futures import ThreadPoolExecutor

    size = path.stat().st_size
    body = {**draft, "sizeBytes": str(size)}
    if size <= _PART:
        url = api.request("DatasetService/GetUploadDraftUrl", body, _Deadline(timeout),
                          lambda answer, _: _string(answer, "uploadUrl"))
        api.upload(url, path, 0, size, deadline)
        return
    count = min(-(-size // _PART), 10_000)
    step = -(-size // count)
    body["parts"] = str(count)
    urls = api.request("DatasetService/StartMultipartUploadDraft", body, _Deadline(timeout),
                       lambda answer, _: list(answer["multipartUploadUrls"]))
    if len(urls) != count:
        raise InvalidResponse(f"there are {len(urls)} upload URLs for {count} parts")
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(api.upload, url, path, i * step, min(step, size - i * step), deadline)
                for i, url in enumerate(urls)]
        try:
            parts = [{"partNum": str(i), "etag": part.result()} for i, part in enumerate(sent, 1)]
        finally:
            for part in sent:
                part.cancel()  # after a failure the rest is not worth sending
    finished = {**draft, "uploadedParts": parts}
    api.request("DatasetService/FinishMultipartUploadDraft", finished, _Deadline(timeout))


# --- HTTP client ----------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One kind of request. What `creates` paid work goes out on a fresh connection, with an
    Idempotency-Key, and again only if the service surely did not take it. What is not to `sign`
    carries no credential: it fetches one, or goes to a pre-signed URL."""

    service: str
    path: str
    method: str = "POST"
    creates: bool = False
    sign: bool = True


_PRE_SIGNED = "(pre-signed)"
_HOSTS = {
    "llm": "https://llm.api.cloud.yandex.net",
    "operation": "https://operation.api.cloud.yandex.net",
    "iam": "https://iam.api.cloud.yandex.net",
    "grpc": "grpcs://llm.api.cloud.yandex.net:443",  # what Yandex serves by gRPC alone
}
_CALLS = {
    "run": _Call("llm", "/foundationModels/v1/completion"),
    "run_deferred": _Call("llm", "/foundationModels/v1/completionAsync", creates=True),
    "tokenize": _Call("llm", "/foundationModels/v1/tokenizeCompletion"),
    "operation": _Call("operation", "/operations/{id}", "GET"),
    "cancel_operation": _Call("operation", "/operations/{id}:cancel", "GET"),
    "chat": _Call("llm", "/v1/chat/completions"),
    "models": _Call("llm", "/v1/models", "GET"),
    "iam": _Call("iam", "/iam/v1/tokens", sign=False),
    "metadata": _Call("", MetadataAuth.path, "GET", sign=False),
    "upload": _Call("", _PRE_SIGNED, "PUT", sign=False),
    "download": _Call("", _PRE_SIGNED, "GET", sign=False),
}
for _service, _methods in {  # gRPC: POST /yandex.cloud.<service>/<method>; with + it creates
    "ai.tuning.v1.TuningService": "+Tune Describe GetMetricsUrl",
    "ai.dataset.v1.DatasetService": "+Create GetUploadDraftUrl StartMultipartUploadDraft Validate Describe "
                                    "FinishMultipartUploadDraft List Delete GetDownloadUrls",
    "ai.foundation_models.v1.TextGenerationBatchService": "+Completion",
    "ai.batch_inference.v1.BatchInferenceService": "Describe Cancel",
    "operation.OperationService": "Get Cancel",
}.items():
    for _method in _methods.split():
        _name = f"{_service.rpartition('.')[2]}/{_method.lstrip('+')}"
        _path = f"/yandex.cloud.{_service}/{_method.lstrip('+')}"
        _CALLS[_name] = _Call("grpc", _path, creates=_method.startswith("+"))


class _Deadline:
    """A point on the monotonic clock, made once by the public method that took `timeout`."""

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None:
            _check_seconds("timeout", timeout)
        self.at = float("inf") if timeout is None else time.monotonic() + timeout

    def over(self, pause: float = 0) -> bool:
        """Whether it is over in `pause` seconds."""
        return time.monotonic() + pause >= self.at

    def left(self) -> float | None:
        """Seconds left, None without a limit. Raises DeadlineExceeded when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the time is up")
        return None if left == float("inf") else left

    def within(self, timeout: float | None) -> _Deadline:
        """The sooner of this one and `timeout` seconds from now."""
        other = _Deadline(timeout)
        other.at = min(self.at, other.at)
        return other

    def sleep(self, pause: float) -> None:
        time.sleep(max(0.0, min(pause, self.at - time.monotonic())))

    def acquire(self, lock: Any, what: str) -> None:
        """A lock or a place, or DeadlineExceeded."""
        left = self.left()
        if not (lock.acquire() if left is None else lock.acquire(timeout=left)):
            raise DeadlineExceeded(f"the time was up while waiting for {what}")


_THREAD = threading.local()  # .exchange: what this thread is sending


_TRANSPORT = (requests.RequestException, HTTPError, HTTPException, OSError, ValueError)


class _Exchange:
    """One attempt of one call. The connection that carries it finds it in `_THREAD`."""

    def __init__(self, client: _Client, call: _Call, url: str, body: Any, deadline: _Deadline,
                 headers: Mapping[str, str]) -> None:
        self.client, self.call, self.url, self.body, self.deadline = client, call, url, body, deadline
        self.headers = headers  # the same in each attempt: without the credential
        self.authorization: str | None = None  # None: not fetched yet
        self.sent = False  # True as soon as the service may have the request
        self.place: threading.Semaphore | None = None
        self.response: Any = None

    @property
    def about(self) -> dict[str, str]:
        """What the hint of an error names."""
        body = self.body if isinstance(self.body, dict) else {}
        model = body.get("modelUri") or body.get("model") or body.get("baseModelUri") or "in use"
        auth = self.client.auth
        return {"model": model, "folder": self.client.config.folder_id or "of the key",
                "kind": auth.kind if auth else "credential"}

    def hide(self, text: str) -> str:
        """Without the credential, should a gateway have echoed it."""
        auth = self.client.auth
        oauth = auth._secret if isinstance(auth, OAuthTokenAuth) else ""
        for secret in ((self.authorization or "").partition(" ")[2], oauth):
            text = text.replace(secret, "***") if secret else text
        return text

    def described(self, failure: YandexGPTError) -> YandexGPTError:
        """The failure, with what its reader needs to know about the call, and nothing secret."""
        failure.args = (self.hide(str(failure)),)
        failure.client_request_id = self.headers.get("x-client-request-id")
        if self.response is not None:
            failure.request_id = self.response.headers.get("x-request-id")
        if self.call.creates:
            status = failure.status_code if isinstance(failure, APIError) else 500
            taken = self.sent and status >= 500 and status != 503
            failure.idempotency_key = key = self.headers["Idempotency-Key"]
            failure._add(f"The service may have taken the request (Idempotency-Key {key}): look before "
                         "you send it again" if taken else "The service did not take the request")
        return failure

    def close(self) -> None:
        """Ends the connection too, unless the answer was read to its end."""
        if self.response is not None:
            self.response.close()
        if self.place is not None:
            self.place.release()
            self.place = None

    def guarded(self, act: Callable[[], _T]) -> _T:
        """`act`, its exceptions turned into this module's."""
        try:
            return act()
        except YandexGPTError:
            raise
        except _TRANSPORT as error:
            failure = self.failure(error)
        raise failure  # out here it does not drag along, as __context__, what may hold a secret

    def failure(self, error: BaseException) -> YandexGPTError:
        proxies = "".join(self.client.proxies(self.url).values())
        secret = "@" in proxies or self.call.path == _PRE_SIGNED
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        reason = type(cause).__name__ if secret else f"{type(cause).__name__}: {cause}"
        host, trusted = urlsplit(self.url).hostname, "CERTIFICATE" not in repr(error).upper()
        if self.deadline.over():
            failure: YandexGPTError = DeadlineExceeded(f"no whole answer from {host} in time ({reason})")
        elif trusted:
            failure = ConnectionFailed(
                f"no whole answer from {host} ({reason}); are the network and the endpoint right?")
        else:
            failure = ConnectionFailed(
                f"the certificate of {host} is not trusted ({reason}); if it is a gateway of yours, name its "
                "CA: ClientConfig(verify='ca.pem')", retry=False)
        failure.__cause__ = None if secret else error
        return failure

    def content(self) -> Any:
        return self.guarded(lambda: self.response.content)

    def pieces(self) -> Iterator[bytes]:
        """The answer's bytes as they come."""
        raw = self.response.raw
        if not raw.chunked and "content-length" not in raw.headers and hasattr(raw, "read1"):
            chunks = iter(lambda: raw.read1(1 << 16, decode_content=True), b"")
        else:  # (urllib3 before 2.1 has no read1, and read waits for all it was asked for)
            size = None if raw.chunked else 1 << 16 if "content-length" in raw.headers else 1
            chunks = self.response.iter_content(size)
        try:
            yield from chunks
            return
        except YandexGPTError:
            raise
        except _TRANSPORT as error:
            failure = self.failure(error)
        raise failure  # out here, as in `guarded`, which would cost two calls a piece

    def error(self) -> APIError:
        """An answer that is an error, as an exception."""
        try:
            content = self.content()
        except (ConnectionFailed, DeadlineExceeded):
            content = b""  # its status says enough
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = content.decode("utf-8", "replace")
        return _error_from(self, self.response.status_code, self.response.headers, body)


_ENVIRONMENT = (
    "YANDEX_GPT_ENDPOINT YANDEX_GPT_GRPC_ENDPOINT YC_API_KEY YC_IAM_TOKEN YC_OAUTH_TOKEN YC_TOKEN "
    "YC_METADATA_ADDR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HTTPS_PROXY HTTP_PROXY NO_PROXY ALL_PROXY "
    "https_proxy http_proxy no_proxy all_proxy"
).split()
_LOCKS = [threading.Lock()]


def _client(config: ClientConfig) -> _Client:
    """What sends for this config in this process and environment; made at first use."""
    with _LOCKS[0]:
        return _made_client(config, tuple(map(os.environ.get, _ENVIRONMENT)))


@lru_cache(maxsize=128)  # bounded: a function may make a config an event
def _made_client(config: ClientConfig, environment: tuple[str | None, ...]) -> _Client:
    return _Client(config)


@lru_cache(maxsize=1)
def _session() -> requests.Session:
    """One pool of connections, whatever the credentials are."""
    session = requests.Session()
    for scheme in ("http", "https"):
        session.mount(f"{scheme}://", _HTTPAdapter(pool_maxsize=512))
        session.mount(f"{scheme.replace('http', 'grpc')}://", _GRPCAdapter())
    return session


def _forget_clients() -> None:
    """After a fork: the parent's sockets, locks, places and tokens are not the child's."""
    _made_client.cache_clear()
    _session.cache_clear()
    _LOCKS[0] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_clients)


class _Client:
    """Sends the requests of one config in one process; not pickled, but found by config."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.auth: _Auth | None = config.auth
        self._kept = ("", 0.0)  # an Authorization header, and until when it is good
        self._lock = threading.Lock()  # held by the thread that fetches the next one
        self._places = config.max_concurrency and threading.BoundedSemaphore(config.max_concurrency)
        self._proxies: dict[str, dict[str, str]] = {}
        bundle = _environ("REQUESTS_CA_BUNDLE") or _environ("CURL_CA_BUNDLE") or True
        self._verify = bundle if config.verify is True else config.verify
        if isinstance(self._verify, str) and not os.path.exists(self._verify):
            raise ConfigError(f"there is no CA bundle {self._verify!r} (verify=, REQUESTS_CA_BUNDLE)")
        some = config.auth or IAMTokenAuth("found-later")
        endpoint = config.endpoint or _environ("YANDEX_GPT_ENDPOINT")
        grpc = config.grpc_endpoint or _environ("YANDEX_GPT_GRPC_ENDPOINT")
        self._hosts = _HOSTS
        if endpoint:
            _check_endpoint("endpoint", endpoint, some)
            base, parts = endpoint.rstrip("/"), urlsplit(endpoint)
            port = "" if parts.port else ":443" if parts.scheme == "https" else ":80"
            self._hosts = {**dict.fromkeys(_HOSTS, base), "grpc": f"grpc{parts.scheme[4:]}://{parts.netloc}{port}"}
        if grpc:
            _check_endpoint("grpc_endpoint", grpc, some)
            self._hosts = {**self._hosts, "grpc": grpc.rstrip("/")}
        self._session = _session()

    def request(self, name: str, body: Any, deadline: _Deadline,
                read: Callable[[Any, Mapping[str, str]], _T] = lambda answer, headers: answer, *,
                id: str = "", url: str = "") -> _T:
        """The decoded answer, as `read` makes it of the JSON and the headers."""
        def receive(exchange: _Exchange) -> _T:
            answer = _json(exchange, exchange.content())
            value = _checked(read, answer, exchange.response.headers)
            exchange.close()
            return value

        return self._send(name, body, deadline, receive, id=id, url=url)

    def stream(self, name: str, body: Any, deadline: _Deadline, read: Callable[[_Lines], Iterator[Result]],
               ) -> tuple[_Exchange, Result, Iterator[Result]]:
        """What `read` makes of the lines, its first Result being there. Until then, the call may
        be sent again; from then on the exchange is open, and the caller's to close."""
        def receive(exchange: _Exchange) -> tuple[_Exchange, Result, Iterator[Result]]:
            results = read(_Lines(exchange))
            return exchange, next(results), results

        return self._send(name, body, deadline, receive)

    def upload(self, url: str, path: Path, start: int, size: int, deadline: _Deadline) -> str:
        """PUT a piece of a file to a pre-signed URL; gives its ETag."""
        def receive(exchange: _Exchange) -> str:
            exchange.content()
            exchange.close()
            return exchange.response.headers.get("etag") or ""

        return self._send("upload", lambda: _Piece(path, start, size), deadline, receive, url=url)

    def download(self, url: str, path: Path, deadline: _Deadline) -> None:
        """GET a pre-signed URL into a file, which has its name once it is whole."""
        part = path.with_name(path.name + ".part")

        def receive(exchange: _Exchange) -> None:
            with part.open("wb") as file:
                file.writelines(exchange.pieces())
            exchange.close()

        try:
            self._send("download", None, deadline, receive, url=url)
            os.replace(part, path)
        finally:
            if part.exists():
                part.unlink()

    def _send(self, name: str, body: Any, deadline: _Deadline, receive: Callable[[_Exchange], _T], *,
              id: str = "", url: str = "") -> _T:
        """The one loop that sends: until `receive` has what it wants, or nothing may go out again."""
        from uuid import uuid4

        call = _CALLS[name]
        url = url or self._hosts[call.service] + call.path.format(id=id)
        headers = {"User-Agent": _USER_AGENT}
        data = body if callable(body) else body and _encoded(body)
        if isinstance(data, bytes):
            headers["Content-Type"] = "application/json"
        if call.service:
            headers["x-client-request-id"] = str(uuid4())
            if self.config.data_logging is False:
                headers["x-data-logging-enabled"] = "false"
        if call.creates:
            headers["Idempotency-Key"] = str(uuid4())
        if name in ("chat", "models") and self.config.folder_id:
            headers["OpenAI-Project"] = self.config.folder_id
        if name == "metadata":
            headers["Metadata-Flavor"] = "Google"
        tries = attempts = 0
        rejected, quota = "", None  # what a 401 answered; the last answer, if about concurrency
        failure = YandexGPTError()
        while True:
            exchange = _Exchange(self, call, url, body, deadline, headers)
            try:
                authorization = self._authorization(deadline, rejected) if call.sign else ""
                if rejected and authorization == rejected:
                    raise failure  # there is no other credential
                exchange.authorization = authorization
                self._attempt(exchange, data)
                return receive(exchange)
            except BaseException as error:
                exchange.close()
                if not isinstance(error, YandexGPTError):
                    raise
                failure = error
            if quota is not None and isinstance(failure, DeadlineExceeded):
                failure = quota  # that is what it was waiting for
            gauge = isinstance(failure, RateLimitError) and "gauge" in failure.message
            quota = failure if gauge else None
            tries, attempts = tries + 1, attempts + (not gauge)
            pause = self._pause(exchange, failure, tries, attempts, rejected)
            if isinstance(failure, AuthenticationError):
                rejected = exchange.authorization or ""
            if pause is not None:
                _log.warning("%s is tried again in %.1f s, after: %s", name, pause,
                             exchange.hide(str(failure)))
                deadline.sleep(pause)
            if pause is None or deadline.over():
                raise exchange.described(failure)

    def _pause(self, exchange: _Exchange, failure: YandexGPTError, tries: int, attempts: int,
               rejected: str) -> float | None:
        """Seconds before the next attempt; None: there is none."""
        retry, after = self.config.retry, getattr(failure, "retry_after", None)
        if retry.max_attempts == 1 or exchange.authorization is None or self.auth is None:
            return None  # (getting a credential has its own attempts, looking for one has none)
        if isinstance(failure, AuthenticationError) and exchange.authorization and not rejected:
            return 0.0  # once, with a newer credential
        if attempts >= retry.max_attempts or not _retryable(exchange.call, failure, exchange.sent):
            return None
        pause = _backoff(retry, tries) if after is None else after
        waits_for_place = isinstance(failure, RateLimitError) and "gauge" in failure.message and after is None
        return None if exchange.deadline.over(pause) and not waits_for_place else pause

    def _attempt(self, exchange: _Exchange, data: Any) -> None:
        """Send once. The exchange has the answer then, its body still to be read."""
        call, deadline, url = exchange.call, exchange.deadline, exchange.url
        if call.sign and self._places:
            deadline.acquire(self._places, f"one of {self.config.max_concurrency} places (max_concurrency); "
                                           "an open stream keeps its place until it is closed")
            exchange.place = self._places
        request = requests.PreparedRequest()  # by hand: no settings of a session are merged into it
        request.method, request.url, request.headers = call.method, url, CaseInsensitiveDict(exchange.headers)
        request.body = body = data() if callable(data) else data
        if body is not None:
            request.headers["Content-Length"] = str(len(body))
        if exchange.authorization:
            request.headers["Authorization"] = exchange.authorization
            if self.config.folder_id and exchange.authorization.startswith("Bearer"):
                request.headers["x-folder-id"] = self.config.folder_id
        started, _THREAD.exchange = time.monotonic(), exchange
        try:
            exchange.response = answer = exchange.guarded(lambda: self._session.get_adapter(url).send(
                request, stream=True, timeout=deadline.left(), verify=self._verify,
                proxies=self.proxies(url)))
        finally:
            _THREAD.exchange = None
            if callable(data):
                body.close()
        _log.debug("%s %s: %d, %.0f ms, request id %s", call.method, call.path, answer.status_code,
                   1000 * (time.monotonic() - started), answer.headers.get("x-request-id"))
        if not 200 <= answer.status_code < 300:
            raise exchange.error()

    def proxies(self, url: str) -> dict[str, str]:
        """The environment's proxies for a URL, looked up once a host."""
        scheme, _, rest = url.partition("://")
        host = f"{scheme.replace('grpc', 'http')}://{rest.partition('/')[0]}"
        if host not in self._proxies:
            local = rest.endswith(MetadataAuth.path)
            self._proxies[host] = {} if local else dict(get_environ_proxies(host))
        return self._proxies[host]

    def keep(self, fetched: tuple[str, float]) -> str:
        self._kept = (fetched[0], time.monotonic() + fetched[1])
        return fetched[0]

    def _authorization(self, deadline: _Deadline, rejected: str) -> str:
        """The Authorization header. Of all threads that need a new one, one fetches it."""
        if self.auth is not None and not self.auth.cached:
            return self.auth._fetch(self, deadline)[0]
        header, until = self._kept
        if header not in ("", rejected) and time.monotonic() < until:
            return header
        deadline.acquire(self._lock, "the thread that fetches the credential")
        try:
            self.auth = self.auth or _find_auth(self, deadline)
            header, until = self._kept
            if self.auth.cached and header not in ("", rejected) and time.monotonic() < until:
                return header
            return self.keep(self.auth._fetch(self, deadline))
        finally:
            self._lock.release()


def _retryable(call: _Call, failure: YandexGPTError, sent: bool) -> bool:
    """May it go out again without doing paid work twice?"""
    if isinstance(failure, ConnectionFailed):
        return failure.retry and not (call.creates and sent)
    status = failure.status_code if isinstance(failure, APIError) else 0
    return status in (429, 503) or (status in (502, 504) and not call.creates)


def _backoff(retry: RetryConfig, tries: int) -> float:
    """Exponential back-off with full jitter, in seconds."""
    bound = retry.initial_backoff * retry.multiplier ** min(tries - 1, 60)
    return random.uniform(0, min(retry.max_backoff, bound))


def _encoded(body: Any) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"a text holds {half!a}, half a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the request is no JSON: {error}") from error


_decode_json = json.JSONDecoder().raw_decode  # half the cost of json.loads for an event of a stream


def _json(exchange: _Exchange, content: bytes) -> dict[str, Any]:
    """A body or line that has to be a JSON object."""
    try:
        text = str(content, "utf-8").strip()
        answer, end = _decode_json(text)
        problem = f"is {type(answer).__name__}" if end == len(text) else "is not JSON (more follows)"
    except (ValueError, RecursionError) as error:
        answer, end, text, problem = None, 0, "", f"is not JSON ({type(error).__name__})"
    if not isinstance(answer, dict) or end != len(text):
        text = exchange.hide(content.decode("utf-8", "replace"))[:200]
        raise InvalidResponse(f"the answer {problem}: {text!r}",
                              request_id=exchange.response.headers.get("x-request-id"))
    return answer


def _checked(read: Callable[..., _T], *answer: Any) -> _T:
    """`read(*answer)`; what it cannot read is an InvalidResponse."""
    try:
        return read(*answer)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        shown = f": {str(answer[0])[:200]}" if answer else ""
        raise InvalidResponse(f"the answer is not what the API promises ({type(error).__name__}: {error})"
                              f"{shown}") from error


class _Lines:
    """The lines of a streamed answer, as they come."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange, self._lines = exchange, self._split()
        self._ending = self._torn = False
        self.request_id = exchange.response.headers.get("x-request-id")

    def __iter__(self) -> Iterator[bytes]:
        return self._lines

    def _split(self) -> Iterator[bytes]:
        rest: list[bytes] = []  # of a long line; joined once
        try:
            for piece in self._exchange.pieces():
                first, *more = piece.split(b"\n")
                rest.append(first)
                if more:
                    yield b"".join(rest)
                    yield from more[:-1]
                    rest = more[-1:]
        except (ConnectionFailed, DeadlineExceeded):
            if not self._ending:
                raise
        self._torn = True  # from here on, a line that makes no sense was cut off
        yield b"".join(rest)

    def end(self) -> None:
        """All that counts has come: what follows gets a second, and may fail."""
        if not self._ending:
            self._ending = True
            self._exchange.deadline = self._exchange.deadline.within(1)

    def drain(self) -> None:
        """To the end of the answer, so that the connection can be used again."""
        self.end()
        for _ in self._lines:
            pass

    def event(self, line: bytes) -> dict[str, Any]:
        """A line's JSON. An error in it is raised."""
        try:
            event = _json(self._exchange, line)
        except InvalidResponse as error:
            if self._torn:
                raise StreamInterrupted("the stream ended within a line") from error
            raise
        if event.get("error"):
            raise _error_from(self._exchange, 200, self._exchange.response.headers, event)
        return event

    def events(self) -> Iterator[dict[str, Any]]:
        """Server-sent events. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
        data: list[bytes] = []
        for line in self._lines:
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif line.startswith(b"{"):  # an error outside of any event
                data.append(line)
            if data and (self._torn or not line.strip()):
                text = data[0] if len(data) == 1 else b"\n".join(data)
                data.clear()
                if text.strip() == b"[DONE]":
                    return self.drain()
                yield self.event(text)


class _Piece:
    """A piece of a file, as a request's body."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file, self._left = path.open("rb"), size
        self._file.seek(start)

    def __len__(self) -> int:
        return self._left

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._file.close()


class _TimedReader(io.RawIOBase):
    """What http.client reads an answer from: a socket, for no longer than the exchange has left."""

    def __init__(self, sock: socket.socket, exchange: _Exchange) -> None:
        self._sock, self._exchange = sock, exchange
        self._raw: Any = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self._sock.settimeout(self._exchange.deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _connect(host: str, port: int, deadline: _Deadline) -> socket.socket:
    """A TCP connection; every address gets its share of what the deadline leaves."""
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    for place, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        left = deadline.left()
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left and left / (len(addresses) - place + 1))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.settimeout(deadline.left())
            return sock
        except OSError:
            sock.close()
            if place == len(addresses):
                raise
    raise OSError("the name has no address")


class _Timed:
    """A connection of urllib3 that keeps to the deadline of the exchange it carries."""

    used = 0.0  # by the wall clock: the monotonic one may stand still in a frozen function
    connecting = False

    def _new_conn(self: Any) -> socket.socket:
        try:
            return _connect(self._dns_host, self.port, _THREAD.exchange.deadline)
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error

    def connect(self: Any) -> None:
        self.connecting, self.blocksize = True, 1 << 18  # (of what is read of a file at a time)
        try:
            super().connect()  # type: ignore[misc]
        finally:
            self.connecting = False

    def send(self: Any, data: Any) -> None:
        if self.sock is None:
            self.connect()
        exchange, self.used = _THREAD.exchange, time.time()
        exchange.sent = exchange.sent or not self.connecting  # a proxy's CONNECT is not the request
        for start in range(0, len(data), 1 << 20) if isinstance(data, bytes) else (0,):
            self.sock.settimeout(exchange.deadline.left())
            super().send(data[start:start + (1 << 20)] if isinstance(data, bytes) else data)  # type: ignore[misc]

    def response_class(self: Any, sock: Any, *args: Any, **kwargs: Any) -> HTTPResponse:
        return HTTPResponse(_TimedReader(sock, _THREAD.exchange), *args, **kwargs)  # type: ignore[arg-type]


class _Pool:
    """A pool of urllib3 that closes what has idled for 30 s, and gives a call that creates
    something a fresh connection: on a reused one nobody knows what the service got."""

    def _get_conn(self: Any, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)  # type: ignore[misc]
        if _THREAD.exchange.call.creates or time.time() - connection.used > 30:
            connection.close()
        return connection


_POOLS = {
    scheme: type("_TimedPool", (_Pool, pool), {"ConnectionCls": type("_TimedConnection", (_Timed, base), {})})
    for scheme, pool, base in (("http", HTTPConnectionPool, HTTPConnection),
                               ("https", HTTPSConnectionPool, HTTPSConnection))
}


class _HTTPAdapter(HTTPAdapter):
    """requests' adapter with such pools."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager


_USER_AGENT = f"yandex-gpt/{__version__} python/{sys.version_info[0]}.{sys.version_info[1]}"


# --- LangChain ------------------------------------------------------------------------------------


def _langchain(model: _BaseModel, timeout: float | None) -> BaseChatModel:
    try:
        llm: BaseChatModel = _chat_class()(model=model, timeout=timeout)
        return llm
    except ImportError as error:
        raise ImportError("pip install langchain-core (extra `langchain`)") from error


@lru_cache(maxsize=1)
def _chat_class() -> Any:
    """LangChain's chat model over a Model or ChatModel, made when it is asked for."""
    chat_models = import_module("langchain_core.language_models.chat_models")
    messages_, outputs = import_module("langchain_core.messages"), import_module("langchain_core.outputs")
    to_openai_tool = import_module("langchain_core.utils.function_calling").convert_to_openai_tool

    class ChatYandexGPT(chat_models.BaseChatModel):  # type: ignore[misc, name-defined]
        """The API has no stop words: `stop` cuts the text here, after it was billed."""

        model: Any
        timeout: Any = 60
        temperature: Any = None
        max_tokens: Any = None
        stop: Any = None

        @property
        def _llm_type(self) -> str:
            return "yandex-gpt"

        def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
            name = kwargs.get("model") or self.model.uri
            return {**super()._get_ls_params(stop=stop, **kwargs), "ls_model_name": name}

        def bind_tools(self, tools: Any, *, tool_choice: Any = None, **kwargs: Any) -> Any:
            tools = [to_openai_tool(tool) for tool in tools]
            if tool_choice in ("any", True):
                tool_choice = "required"
            elif isinstance(tool_choice, str) and tool_choice not in ("none", "auto", "required"):
                tool_choice = {"type": "function", "function": {"name": tool_choice}}
            return self.bind(tools=tools, **_given(tool_choice=tool_choice or None), **kwargs)

        def _configured(self, given: Any) -> Any:
            changes = _given(temperature=self.temperature, max_tokens=self.max_tokens)
            changes.update({f.name: given[f.name] for f in fields(ModelConfig) if f.name in given})
            if "tools" in changes:
                functions = [tool["function"] for tool in changes["tools"]]
                changes["tools"] = [FunctionTool(f["name"], f.get("description", ""), f["parameters"])
                                    for f in functions]
            model = self.model
            if "model" in given:
                model = type(model)(given["model"], client=model.client, config=model.config)
            return model.configure(**changes)

        def _message(self, kind: Any, result: Result, text: str, last: bool) -> Any:
            calls = [{"name": c.name, "args": c.arguments, "id": c.id or f"call_{i}"}
                     for i, c in enumerate(result.tool_calls or ())]
            more: dict[str, Any] = {}
            if last:
                more["response_metadata"] = {"model_name": result.model_version or self.model.uri,
                                             "finish_reason": result.status.value}
            if last and result.usage:
                usage = result.usage
                more["usage_metadata"] = {"input_tokens": usage.input_text_tokens, "output_tokens":
                                          usage.completion_tokens, "total_tokens": usage.total_tokens}
            return kind(content=text, tool_calls=calls, **more)

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
            result = self._configured(kwargs).run(_from_langchain(messages), timeout=self.timeout)
            text = result.text[:_cut(result.text, stop or self.stop)]
            message = self._message(messages_.AIMessage, result, text, last=True)
            return outputs.ChatResult(generations=[outputs.ChatGeneration(message=message)])

        def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
            stop, sent = stop or self.stop or (), 0
            held = max([len(word) - 1 for word in stop], default=0)  # a stop word may have begun
            results = self._configured(kwargs).run_stream(_from_langchain(messages), timeout=self.timeout)
            for result in results:
                last = result.status is not Status.PARTIAL
                end = _cut(result.text, stop)
                last = last or end < len(result.text)
                upto = end if last else max(sent, end - held)
                message = self._message(messages_.AIMessageChunk, result, result.text[sent:upto], last)
                sent = upto
                chunk = outputs.ChatGenerationChunk(message=message)
                if run_manager and chunk.text:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
                if last:
                    results.close()
                    return

    return ChatYandexGPT


def _cut(text: str, stop: Iterable[str] | None) -> int:
    """Where the first stop word begins, or the text ends."""
    return min([text.find(word) for word in stop or () if word in text], default=len(text))


def _from_langchain(messages: Iterable[Any]) -> list[Any]:
    """LangChain's messages; results of tools that follow each other are one message here."""
    roles = {"human": "user", "ai": "assistant"}
    names: dict[str, str] = {}
    found: list[Any] = []
    for message in messages:
        text = message.content if isinstance(message.content, str) else None
        if message.type == "tool":
            item = {"name": names.get(message.tool_call_id) or message.name or "", "content": text or
                    json.dumps(message.content, ensure_ascii=False), "tool_call_id": message.tool_call_id}
            if found and "tool_results" in found[-1]:
                found[-1]["tool_results"].append(item)
            else:
                found.append({"tool_results": [item]})
        elif getattr(message, "tool_calls", None):
            calls = [ToolCall(c["name"], c["args"], c["id"]) for c in message.tool_calls]
            names.update({str(call.id): call.name for call in calls})
            found.append({"role": "assistant", "text": text or "", "tool_calls": calls})
        else:
            role = getattr(message, "role", None) or roles.get(message.type, message.type)
            parts = message.content if text is None else ()
            words = [part if isinstance(part, str) else part.get("text") for part in parts]
            if text is None and None not in words:
                text = "".join(words)
            found.append({"role": role, "content": list(parts) if text is None else text})
    return found


# --- Command line ---------------------------------------------------------------------------------


def _parser() -> ArgumentParser:
    import argparse

    shared = argparse.ArgumentParser(add_help=False)
    for flags, options in _OPTIONS:
        shared.add_argument(flags, **options)
    parser = argparse.ArgumentParser(
        prog="yandex-gpt", epilog="`yandex-gpt PROMPT` is `yandex-gpt run PROMPT`. "
        "Set YC_FOLDER_ID and YC_API_KEY (or YC_IAM_TOKEN, YC_OAUTH_TOKEN) first.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (function, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, parents=[shared])
        for flags, options in arguments:
            command.add_argument(flags, **options)
    return parser


def _model_of(args: Namespace) -> Any:
    schema = None
    if args.schema:
        text = Path(args.schema).read_text(encoding="utf-8")
        schema = {"json_schema": json.loads(text), "name": re.sub(r"\W", "_", Path(args.schema).stem)}
    config = ModelConfig(args.temperature, args.max_tokens, args.reasoning, schema)
    return (ChatModel if args.openai else Model)(args.model, version=args.model_version, config=config)


def _system_of(args: Namespace) -> list[Any]:
    return [{"role": "system", "text": args.system}] if args.system else []


def _prompt_of(args: Namespace) -> list[Any]:
    given = "" if args.prompt in (None, "-") else args.prompt
    piped = sys.stdin.read() if not given or not sys.stdin.isatty() else ""
    text = "\n\n".join(part for part in (given, piped) if part.strip())
    if not text:
        raise ConfigError("no prompt: give it as an argument or on standard input")
    return [*_system_of(args), text]


def _print_answer(args: Namespace, model: Any, messages: list[Any]) -> Result:
    """Print the answer as it comes, or whole where it has to be."""
    whole = args.json or args.schema or args.no_stream
    result: Any = None
    for result in [model.run(messages)] if whole else model.run_stream(messages):
        print("" if whole else result.delta, end="", flush=True)
    value = result.to_dict() if args.json else result.parse() if args.schema else None
    print(json.dumps(value, ensure_ascii=False, indent=2) if value is not None else result.text * bool(whole))
    return result  # type: ignore[no-any-return]


def _run(args: Namespace) -> None:
    "ask once; the answer is printed as it comes"
    _print_answer(args, _model_of(args), _prompt_of(args))


def _chat(args: Namespace) -> None:
    "a conversation, each line of input being a message; Ctrl-D ends it"
    model, messages = _model_of(args), _system_of(args)
    with suppress(EOFError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                messages = _print_answer(args, model, [*messages, line]).messages


def _tokenize(args: Namespace) -> None:
    "count a prompt's tokens"
    tokens = Model(args.model, version=args.model_version).tokenize(_prompt_of(args))
    print(json.dumps(tokens, default=_plain, ensure_ascii=False) if args.json else len(tokens))


def _submit(args: Namespace) -> None:
    "leave a prompt with the service, and print the operation's id"
    args.openai = False
    print(_model_of(args).run_deferred(_prompt_of(args)).id)


def _operation_command(args: Namespace) -> None:
    "how an operation stands, and its result"
    kind, _, id = args.id.rpartition(":")
    name = {"": "attach_deferred", "tune": "attach_tune_deferred", "batch": "attach_batch_deferred"}.get(kind)
    if name is None:
        raise ConfigError(f"the id is ID, tune:ID or batch:ID, not {args.id!r}")
    operation = getattr(Model(args.model, version=args.model_version), name)(id)
    if args.cancel:
        operation.cancel()
    status = operation.get_status()
    if args.wait or status.is_succeeded:
        _show(args, _waited(operation, args.id))
    elif args.json:
        print(json.dumps({"id": args.id, "status": status.status_name, "progress": status.progress,
                          "error": status.error}, ensure_ascii=False))
    elif status.is_failed and not args.cancel:
        operation.get_result()  # raises what it failed of
    else:
        print("cancelled" if status.is_failed else status.status_name)


def _show(args: Namespace, result: Any) -> None:
    name = getattr(result, "uri", None) or getattr(result, "id", None) or result.text
    value = result.to_dict() if isinstance(result, Result) else {"result": name}
    print(json.dumps(value, ensure_ascii=False) if args.json else name)


def _waited(operation: Operation[_T], id: str) -> _T:
    try:
        return operation.wait(on_status=_progress)
    except KeyboardInterrupt:
        print(f"\nit goes on; see yandex-gpt operation {id} --wait", file=sys.stderr)
        raise


def _progress(status: OperationStatus) -> None:
    if sys.stderr.isatty():
        share = "" if status.progress is None else f" {status.progress:.0%}"
        end = "\n" if status.done else ""
        print(f"\r\x1b[K{status.status_name}{share}", end=end, file=sys.stderr, flush=True)


def _tune(args: Namespace) -> None:
    "upload JSON Lines, tune the model, print the new one's URI"
    model = _model_of(args)
    dataset = Dataset.upload(args.file, client=model.client, on_status=_progress)
    operation = model.tune_deferred(dataset)
    print(f"tune:{operation.id}", file=sys.stderr, flush=True)
    _show(args, _waited(operation, f"tune:{operation.id}"))


def _batch(args: Namespace) -> None:
    "upload JSON Lines, ask about each row, print the rows with the answers"
    model = _model_of(args)
    dataset = Dataset.upload(args.file, client=model.client, on_status=_progress)
    operation = model.batch_deferred(dataset)
    print(f"batch:{operation.id}", file=sys.stderr, flush=True)
    answers = _waited(operation, f"batch:{operation.id}")
    errors = (operation.get_status().metadata or {}).get("errors") or {}
    for error in errors.get("lineErrors") or ():
        print(f"line {error.get('lineNumber')}: {error.get('message')}", file=sys.stderr)
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as file:
        for row in answers.rows():
            print(json.dumps(row, ensure_ascii=False, default=str), file=file)


def _models(args: Namespace) -> None:
    "list the models of the OpenAI-compatible API"
    print("\n".join(model.uri for model in ChatModel.list()))


_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--model", {"default": "yandexgpt", "help": "name or URI [%(default)s]"}),
    ("--model-version", {"default": "latest"}),
    ("--openai", {"action": "store_true", "help": "the OpenAI-compatible API"}),
    ("--system", {"help": "a system message"}),
    ("--temperature", {"type": float, "help": "0 to 1"}),
    ("--max-tokens", {"type": int}),
    ("--reasoning", {"help": "enabled_hidden; with --openai low, medium, high"}),
    ("--schema", {"metavar": "FILE", "help": "a JSON Schema for the answer"}),
    ("--json", {"action": "store_true", "help": "print the whole result"}),
    ("--no-stream", {"action": "store_true", "help": "print the answer when it is complete"}),
    ("--debug", {"action": "store_true", "help": "log requests, show tracebacks"}),
]
_PROMPT: list[tuple[str, dict[str, Any]]] = [("prompt", {"nargs": "?", "help": "- or none: standard input"})]
_COMMANDS: dict[str, tuple[Callable[[Any], None], list[tuple[str, dict[str, Any]]]]] = {
    "run": (_run, _PROMPT), "chat": (_chat, []), "tokenize": (_tokenize, _PROMPT),
    "submit": (_submit, _PROMPT), "operation": (_operation_command, [
        ("id", {"help": "as submit printed it; tune:ID, batch:ID"}),
        ("--wait", {"action": "store_true"}), ("--cancel", {"action": "store_true"})]),
    "tune": (_tune, [("file", {})]), "batch": (_batch, [("file", {}), (
        "-o", {"dest": "output", "metavar": "RESULT", "help": "the file for the rows"})]),
    "models": (_models, []),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command `yandex-gpt`. Gives the exit status: 1 for errors, 2 for usage, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (arguments[:1] and arguments[0] not in (*_COMMANDS, "-h", "--help", "--version")) \
            or (not arguments and not sys.stdin.isatty()):
        arguments.insert(0, "run")
    args = _parser().parse_args(arguments)
    if args.debug:
        logging.basicConfig(level=logging.DEBUG)
    _log.addHandler(logging.NullHandler())  # a retry is no news at a terminal
    try:
        _COMMANDS[args.command][0](args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (YandexGPTError, OSError, ValueError, TypeError, ImportError) as error:
        if args.debug:
            raise
        print(f"yandex-gpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


# --- gRPC transport (appendix: a reader of the API can stop here) ---------------------------------

# "@" a package and its service, "=" an enum (numbered from 0), "/" a method (request > answer);
# else a message. A field is name=number:type: numbers run on, string goes without saying;
# * repeated, % a map from strings, ? shown even when it holds its default (it is in a oneof).
_MESSAGES = """@google.protobuf
NullValue = NULL_VALUE; Timestamp seconds:int64 nanos:int32; Any typeUrl value:bytes; Empty
Value nullValue:NullValue? numberValue:double? stringValue? boolValue:bool? structValue:Struct
  listValue:ListValue; Struct fields:Value%; ListValue values:Value*
DoubleValue value:double; Int64Value value:int64; BoolValue value:bool; @google.rpc
Status code:int32 message details:Any*; @yandex.cloud.operation OperationService
Operation id description createdAt:Timestamp createdBy modifiedAt:Timestamp done:bool metadata:Any
  error:Status response:Any; /Get operationId > Operation; /Cancel operationId > Operation
@yandex.cloud.ai.tuning.v1 TuningService
State = STATUS_UNSPECIFIED CREATED PENDING IN_PROGRESS COMPLETED FAILED CANCELED DRAFT ARCHIVED PAID
TuningTask taskId operationId=3 status:State folderId createdBy createdAt:Timestamp
  startedAt:Timestamp finishedAt:Timestamp sourceModelUri targetModelUri name description labels%
TuningMetadata tuningTaskId status:State totalSteps:int64 currentStep:int64
TuningResponse tuningTaskId=3 status:State targetModelUri; Weighted datasetId weight:double
Lora rank:int64 alpha:double initialization type; PromptTune virtualTokens:int64; Constant
Linear minLr:double; Scheduler linear:Linear constant:Constant cosine:Linear warmupRatio=101:double
AdamW beta1:double beta2:double eps:double weightDecay:double; Optimizer adamw:AdamW
Parameters seed:int64 lr:double nSamples:int64 additionalArguments=7 lora=100:Lora
  promptTune:PromptTune scheduler=200:Scheduler optimizer:Optimizer
/Tune baseModelUri trainDatasets:Weighted* validationDatasets:Weighted* validationDataset:Weighted
  testDatasets:Weighted* textToTextCompletion=100:Parameters name=200 description labels%
  > Operation
/Describe tuningTaskId > tuningTask:TuningTask; /Cancel tuningTaskId > tuningTaskId
/List folderId pageSize:int64 pageToken status:State > tuningTasks:TuningTask* nextPageToken
/GetMetricsUrl taskId > loadUrl; @yandex.cloud.ai.dataset.v1 DatasetService
DatasetState = STATUS_UNSPECIFIED DRAFT VALIDATING READY INVALID DELETING
Invalid error errorDescription rowNumbers:int64*; Part partNum:int64 etag; File key url
DatasetInfo datasetId folderId name description metadata status:DatasetState taskType
  createdAt:Timestamp updatedAt:Timestamp rows:int64 sizeBytes:int64 createdById labels% createdBy
  updatedBy validationError=21:Invalid* allowDataLog:bool
ValidateDatasetMetadata datasetId validRows:int64 processedRows:int64 totalRows:int64
ValidateDatasetResponse datasetId isValid:bool errors:Invalid*
/Create name folderId description metadata taskType labels% uploadFormat allowDataLog:bool
  > datasetId dataset:DatasetInfo
/GetUploadDraftUrl datasetId sizeBytes:int64 > datasetId uploadUrl
/StartMultipartUploadDraft datasetId sizeBytes:int64 parts:int64 > datasetId multipartUploadUrls*
/FinishMultipartUploadDraft datasetId uploadedParts:Part* > datasetId
/Describe datasetId > dataset:DatasetInfo; /List folderId status:DatasetState* datasetNamePattern
  taskTypeFilter* pageSize:int64 pageToken datasetIds* > datasets:DatasetInfo* nextPageToken
/Validate datasetId > Operation; /Delete datasetId >; /GetDownloadUrls datasetId > datasetId
  downloadUrls:File*; @yandex.cloud.ai.batch_inference.v1 BatchInferenceService
BatchState = STATUS_UNSPECIFIED CREATED PENDING IN_PROGRESS COMPLETED FAILED CANCELED
Mode = REASONING_MODE_UNSPECIFIED DISABLED ENABLED_HIDDEN; Reasoning mode:Mode; Schema schema:Struct
Options temperature:DoubleValue maxTokens:Int64Value reasoningOptions:Reasoning
Request modelUri sourceDatasetId completionOptions:Options dataLoggingEnabled:bool jsonObject:bool?
  jsonSchema:Schema; Line lineNumber:int64 message
Lines batchNumber:int64 firstLine:int64 lastLine:int64 message
Errors status:Status lineErrors:Line* batchErrors:Lines*
Task taskId operationId folderId modelUri sourceDatasetId completionRequest:Request
  status:BatchState resultDatasetId labels% createdBy createdAt:Timestamp startedAt:Timestamp
  finishedAt:Timestamp errors:Errors
/Describe taskId > task:Task; /Cancel taskId > taskId; /Delete taskId > taskId
@yandex.cloud.ai.foundation_models.v1 TextGenerationBatchService
TaskState = BATCH_INFERENCE_TASK_STATUS_UNSPECIFIED CREATED PENDING IN_PROGRESS COMPLETED FAILED
  CANCELED; BatchCompletionResponse taskId taskStatus:TaskState resultDatasetId
BatchCompletionMetadata taskId taskStatus:TaskState completedBatches:int64 totalBatches:int64
CompletionOptions stream:bool temperature:DoubleValue maxTokens:Int64Value
  reasoningOptions:Reasoning; /Completion modelUri completionOptions:CompletionOptions
  sourceDatasetId? jsonObject:bool? jsonSchema:Schema > Operation"""
# Messages that are one of their fields in JSON: which, and what it is when absent.
_PLAIN: dict[str, tuple[str, Any]] = {"Struct": ("fields", {}), "ListValue": ("values", [])}
_PLAIN.update(DoubleValue=("value", 0.0), Int64Value=("value", "0"), BoolValue=("value", False))
_VALUES = {bool: "boolValue", int: "numberValue", float: "numberValue", str: "stringValue"}
_VALUES.update({dict: "structValue", list: "listValue", type(None): "nullValue"})
# HPACK's static table, and the lengths of its 257 Huffman codes (a = 5); they are canonical.
_STATIC = """:authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http
:scheme=https :status=200 :status=204 :status=206 :status=304 :status=400 :status=404 :status=500
accept-charset accept-encoding=gzip,deflate accept-language accept-ranges accept
access-control-allow-origin age allow authorization cache-control content-disposition
content-encoding content-language content-length content-location content-range content-type cookie
date etag expect expires from host if-match if-modified-since if-none-match if-range
if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization
range referer refresh retry-after server set-cookie strict-transport-security transfer-encoding
user-agent vary via www-authenticate"""
_HUFFMAN = """isxxxxxxxtzxxzxxxxxxxxzxxxxxxxxxbffhibdgffdgdbbbaaabbbbbbbcdkbhfibcccccccccccccc
ccccccccdcdioijbkabababbbaccbbbabcbaabccccckgjixprpprrrsrssssststtrstssssqrsrsstrqprrssqsrrtqrssqqrq
srssprrrsrrsvvporsruvvvwwvtuoqvwwvwtqqvvxwwwptpqrqqsrruuttvsvwvvwwwwwxwwwwwvz""".replace("\n", "")
_DATA, _HEADERS, _RESET, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _MORE = 0, 1, *range(3, 10)
_MAX_FRAME_BYTES, _MAX_HEADER_BYTES, _MAX_MESSAGE_BYTES = 1 << 14, 1 << 16, 1 << 26
_MAX_DEPTH, _MAX_IDLE_FRAMES = 100, 2000  # of messages; of frames that bring no data
_HTTP1 = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host"}
_BROKEN = (OSError, TypeError, ValueError, LookupError, OverflowError, struct.error)


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, dict[str, tuple[int, int, str, str]]], dict[str, list[str]]]:
    "_MESSAGES: {message or method: {field: (number, wire type, type, label)}}, {enum: names}."
    messages: dict[str, dict[str, tuple[int, int, str, str]]] = {}
    enums: dict[str, list[str]] = {}
    for statement in re.split(r";\s+|\n(?! )", _MESSAGES):
        head, _, text = statement.partition(" ")
        if head[0] == "@":
            package, service = head[1:] + ".", text
        elif text.startswith("="):
            enums[head] = text.split()[1:]
        else:
            name = package + (service if head[0] == "/" else "") + head
            for side, part in zip((name, name + ">"), text.split(">")):
                number, messages[side] = 0, {}
                for field, given, kind, label in re.findall(r"(\w+)=?(\d*):?(\w*)([*%?]?)", part):
                    number, kind = int(given or number + 1), kind or "string"
                    varint = kind in ("int64", "int32", "bool") or kind in enums
                    wire = 0 if varint else 1 if kind == "double" else 2
                    if label == "%":
                        entry = {"key": (1, 2, "string", "?"), "value": (2, wire, kind, "?")}
                        kind = "%" + kind
                        messages[kind] = entry
                    messages[side][field] = number, wire, kind, label
            messages[head] = messages[name]
            if text.endswith("> Operation"):
                messages[name + ">"] = messages["Operation"]
    return messages, enums


def _to_varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _to_varint(value >> 7)


def _encode_message(name: str, value: Any, depth: int = _MAX_DEPTH) -> bytes:
    "A message, or a method's request, from its JSON form; ConfigError names the field at fault."
    messages, wire = _table()[0], b""
    if name in _PLAIN:
        value = {_PLAIN[name][0]: value}
    elif name == "Value":
        value = {_VALUES[type(value)]: "NULL_VALUE" if value is None else value}
    if not isinstance(value, dict) or not depth:
        raise ConfigError(f"{name}: {value!r:.80} is no object, or nested too deep")
    for key, item in value.items():
        try:
            number, form, kind, label = messages[name][key]
            if label == "%":
                item = [{"key": each, "value": item[each]} for each in item]
            elif label != "*":
                item = [] if item is None and kind != "Value" else [item]
            elif not isinstance(item, list):
                raise TypeError("not a list")
            for one in item:
                if kind in messages:
                    data = _encode_message(kind, one, depth - 1)
                else:
                    data = _encode_scalar(kind, one)
                size = _to_varint(len(data)) if form == 2 else b""
                wire += _to_varint(number << 3 | form) + size + data
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from error
        except _BROKEN as error:
            raise ConfigError(f"{key}: {name} has no such field of {item!r:.80}") from error
    return wire


def _encode_scalar(kind: str, item: Any) -> bytes:
    if isinstance(item, bool) != (kind == "bool"):
        raise TypeError("a bool, or none")
    if kind == "string":
        return str.encode(item)
    if kind == "double":
        return struct.pack("<d", float(item))
    if isinstance(item, str):
        names = _table()[1].get(kind)
        item = names.index(item) if names else int(item)
    return _to_varint(struct.unpack("<Q", struct.pack("<q", item))[0])


def _take(data: io.BytesIO, size: int) -> bytes:
    taken = data.read(size)
    if len(taken) < size:
        raise ValueError("a message or header is cut short")
    return taken


def _varint(data: io.BytesIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = _take(data, 1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1
    raise ValueError("an endless number")


def _each(data: bytes, read: Callable[[io.BytesIO], Any]) -> Iterator[Any]:
    "What `read` takes from `data`, over and over until the end."
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield read(stream)


def _wire_field(data: io.BytesIO) -> tuple[int, int, Any]:
    number, wire = divmod(_varint(data), 8)
    if wire not in (0, 1, 2, 5):
        raise ValueError(f"a field of wire type {wire}")
    if wire == 0:
        return number, wire, _varint(data)
    return number, wire, _take(data, _varint(data) if wire == 2 else 8 if wire == 1 else 4)


def _decode_message(name: str, data: bytes, depth: int = _MAX_DEPTH) -> Any:
    "The JSON form of a message; of a method's answer, when the name is the method's and `>`."
    messages = _table()[0]
    if not depth:
        raise ValueError("a message is nested too deep")
    by_number = {field[0]: (key, *field[1:]) for key, field in messages[name].items()}
    fields: dict[str, Any] = {}
    for number, wire, raw in _each(data, _wire_field):
        key, form, kind, label = by_number.get(number, ("", -1, "", ""))
        packed = (label, wire, form) == ("*", 2, 0)
        if wire != form and not packed:
            continue  # nothing that this table knows
        for one in _each(raw, _varint) if packed else [raw]:
            if kind in messages:
                value = _decode_message(kind, one, depth - 1)
            else:
                value = _decode_scalar(kind, one)
            if label == "%":
                fields.setdefault(key, {})[value["key"]] = value["value"]
            elif label == "*":
                fields.setdefault(key, []).append(value)
            elif label == "?" or kind in messages or one != (0, bytes(8), b"")[form]:
                fields[key] = value
            else:
                fields.pop(key, None)
    return _json_form(name.rpartition(".")[2], fields, depth)


def _decode_scalar(kind: str, raw: Any) -> Any:
    if kind == "string":
        return raw.decode()
    if kind == "double":
        (value,) = struct.unpack("<d", raw)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(value), value)
    if kind in ("bool", "bytes"):
        return raw if kind == "bytes" else raw != 0
    if kind == "int64":
        return str(raw - (raw >> 63 << 64))
    number = (raw + (1 << 31)) % (1 << 32) - (1 << 31)
    return dict(enumerate(_table()[1].get(kind, ()))).get(number, number)


def _json_form(name: str, fields: dict[str, Any], depth: int) -> Any:
    "The fields of a message as JSON has them: some messages have a form of their own there."
    if name in _PLAIN:
        return fields.get(*_PLAIN[name])
    if name == "Value":
        return None if "nullValue" in fields else next(iter(fields.values()), None)
    if name[0] == "%":
        return {"key": "", "value": None if name == "%Value" else "", **fields}
    if name == "Timestamp":
        since = timedelta(seconds=int(fields.get("seconds", 0)))
        fraction = re.sub(r"\.?(000)*$", "", f".{fields.get('nanos', 0):09d}")
        return f"{(datetime(1970, 1, 1) + since).isoformat()}{fraction}Z"
    if name != "Any" or not fields:
        return fields
    url, data = fields.get("typeUrl", ""), fields.get("value", b"")
    name = url.rpartition("/")[2]
    if "." not in name or name not in _table()[0]:
        return {"@type": url, "value": base64.b64encode(data).decode()}
    value = _decode_message(name, data, depth - 1)
    plain = isinstance(value, dict) and not name.endswith(".Struct")
    return {"@type": url, **(value if plain else {"value": value})}


@lru_cache(maxsize=1)
def _huffman_codes() -> dict[str, int]:
    codes, code, length = {}, 0, 5
    for size, symbol in sorted((ord(letter) - 92, at) for at, letter in enumerate(_HUFFMAN)):
        code, length = code << size - length, size
        codes[f"{code:0{size}b}"] = symbol
        code += 1
    return codes


def _hpack_headers(block: bytes) -> dict[str, str]:
    "A header block (RFC 7541) of a peer that was told to keep no dynamic table."
    data, static, headers = io.BytesIO(block), ["", *_STATIC.split()], {}

    def number(first: int, most: int) -> int:
        return first & most if first & most < most else most + _varint(data)

    def text() -> str:
        (first,) = _take(data, 1)
        raw = _take(data, number(first, 0x7F))
        if first & 0x80:
            decoded, code = bytearray(), ""
            for bit in "".join(f"{byte:08b}" for byte in raw):
                code += bit
                if code in _huffman_codes():
                    decoded.append(_huffman_codes()[code])  # ValueError at 256, the end of string
                    code = ""
            if len(code) > 7 or "0" in code:
                raise ValueError("a header's Huffman code is broken")
            raw = bytes(decoded)
        return raw.decode("utf-8", "replace")

    while data.tell() < len(block):
        (first,) = _take(data, 1)
        if first == 0x20:
            continue  # the dynamic table's size is 0 now
        index = number(first, 0x7F if first & 0x80 else 0x3F if first & 0x40 else 0x0F)
        if first & 0xE0 == 0x20 or first == 0x80 or index > 61:
            raise ValueError("a header refers to a dynamic table")
        name, _, value = static[index].partition("=")
        name = name or text()
        headers[name] = value if first & 0x80 else text()
    return headers


def _hpack_text(text: str) -> bytes:
    data = text.encode("latin-1")
    size, most = len(data), 0x7F
    return (bytes([size]) if size < most else b"\x7f" + _to_varint(size - most)) + data


class _H2Call:
    "One request and its answer: stream 1 of an HTTP/2 connection of its own (RFC 9113)."

    def __init__(self, sock: socket.socket, exchange: _Exchange) -> None:
        self.sock, self.exchange, self.buffer = sock, exchange, bytearray()
        self.headers: dict[str, str] = {}
        self.body, self.block = bytearray(), bytearray()
        self.windows, self.first_window = [65535, 65535], 65535  # what the peer takes: all, ours
        self.settled = self.ended = self.in_block = self.last_block = False
        self.idle = 0

    def close(self) -> None:
        self.sock.close()

    def ask_proxy(self, via: Any, target: str) -> None:
        request, head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n", b""
        if via.username:
            login = ":".join(requests.utils.get_auth_from_url(via.geturl())).encode()
            request += f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"
        self.sock.sendall(f"{request}\r\n".encode())
        while not head.endswith(b"\r\n\r\n") and len(head) < _MAX_HEADER_BYTES:
            head += self._read(1)
        if head.split(b" ")[1:2] != [b"200"]:
            raise ValueError(f"the proxy {via.hostname} answers {head[:80]!r}")

    def start_tls(self, host: str, verify: bool | str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        if verify:
            path = requests.utils.DEFAULT_CA_BUNDLE_PATH if verify is True else verify
            try:
                kind = "capath" if os.path.isdir(path) else "cafile"
                context.load_verify_locations(**{kind: path})
            except OSError as error:
                raise ConfigError(f"verify={path!r}: {error}") from error
        else:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock.settimeout(self.exchange.deadline.left())
        self.sock = secured = context.wrap_socket(self.sock, server_hostname=host)
        if secured.selected_alpn_protocol() != "h2":
            raise ValueError("the server does not offer HTTP/2 (ALPN)")

    def run(self, headers: dict[str, str], data: bytes) -> None:
        pairs = [_hpack_text(key) + _hpack_text(value) for key, value in headers.items()]
        block = b"\x10" + b"\x10".join(pairs)  # each a literal that nobody may index
        if len(block) > _MAX_FRAME_BYTES:
            raise ConfigError(f"the request's headers are over {_MAX_FRAME_BYTES} bytes")
        self.sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._write(_SETTINGS, 0, 0, struct.pack(">HIHI", 1, 0, 2, 0))  # no dynamic table, no push
        while not self.settled:  # so what speaks no HTTP/2 has not been sent the request
            self._advance()
        self.exchange.sent = True
        self._write(_HEADERS, 4, 1, block)
        while not self.ended:
            room = min(*self.windows, _MAX_FRAME_BYTES, len(data))
            if room <= 0:
                self._advance()
                continue
            self._write(_DATA, room == len(data), 1, data[:room])
            self.windows, data = [left - room for left in self.windows], data[room:]

    def _write(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.sock.settimeout(self.exchange.deadline.left())
        head = struct.pack(">IBBI", len(payload), kind, flags, stream)[1:]
        with suppress(ConnectionError):  # what came before the end is still to be read
            self.sock.sendall(head + payload)

    def _read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.sock.settimeout(self.exchange.deadline.left())
            data = self.sock.recv(1 << 16)
            if not data:
                raise ValueError("the connection was closed before the answer's end")
            self.buffer += data
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def _frame(self) -> tuple[int, int, int, bytes]:
        "The next (type, flags, stream, payload)."
        head = self._read(9)
        size, kind, flags, stream = struct.unpack(">IBBI", b"\0" + head)
        if head.startswith(b"HTTP/1"):
            raise ValueError("the answer is HTTP/1.1 where gRPC needs HTTP/2")
        self.idle += kind != _DATA or not size
        if size > _MAX_FRAME_BYTES or self.idle > _MAX_IDLE_FRAMES:
            raise ValueError(f"a frame of {size} bytes, after {self.idle} frames without data")
        return kind, flags, stream & 0x7FFFFFFF, self._read(size)

    def _advance(self) -> None:
        "Acts on the peer's next frame; unknown ones mean nothing."
        kind, flags, stream, payload = self._frame()
        if self.in_block != (kind == _MORE) or (not self.settled and kind != _SETTINGS):
            raise ValueError(f"a frame of type {kind} out of turn")
        of_connection = kind in (_SETTINGS, _PING, _GOAWAY)
        if kind <= _MORE and kind not in (2, _WINDOW) and stream != 1 - of_connection:
            raise ValueError(f"a frame of type {kind} on stream {stream}")
        size = len(payload)
        if kind in (_DATA, _HEADERS) and flags & 8:
            if payload[0] >= size:
                raise ValueError("more padding than frame")
            payload = payload[1 : size - payload[0]]
        if kind == _DATA:
            self.body += payload
            self.ended = bool(flags & 1)
            if len(self.body) > _MAX_MESSAGE_BYTES:
                raise ValueError(f"an answer over {_MAX_MESSAGE_BYTES} bytes")
            for stream in (0, 1) if size else ():
                self._write(_WINDOW, 0, stream, struct.pack(">I", size))
        elif kind == _HEADERS:
            self.block, self.last_block = bytearray(), bool(flags & 1)
            self._on_headers(flags, payload[5:] if flags & 0x20 else payload)
        elif kind == _MORE:
            self._on_headers(flags, payload)
        elif kind in (_RESET, _PUSH):
            name = "RST_STREAM" if kind == _RESET else "PUSH_PROMISE"
            raise ValueError(f"the call was broken off ({name} {int.from_bytes(payload, 'big')})")
        elif kind == _GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            if code or not last:  # otherwise this call will still be finished
                raise ValueError(f"the service goes away (GOAWAY {code}: {payload[8:200]!r})")
        elif kind == _WINDOW and stream < 2:
            self.windows[stream] += struct.unpack(">I", payload)[0] & 0x7FFFFFFF
        elif kind in (_SETTINGS, _PING) and not flags & 1:
            for key, value in struct.iter_unpack(">HI", payload if kind == _SETTINGS else b""):
                if key == 4:
                    self.windows[1] += value - self.first_window
                    self.first_window = value
            self.settled = True
            self._write(kind, 1, 0, payload if kind == _PING else b"")

    def _on_headers(self, flags: int, part: bytes) -> None:
        self.block += part
        self.in_block = not flags & 4
        if len(self.block) > _MAX_HEADER_BYTES:
            raise ValueError(f"headers over {_MAX_HEADER_BYTES} bytes")
        headers = {} if self.in_block else _hpack_headers(bytes(self.block))
        if not self.in_block and headers.get(":status", "")[:1] != "1":  # 103 announces others
            self.headers.update(headers)
            self.ended = self.last_block


class _GRPCAdapter(BaseAdapter):
    "`POST grpcs://host/package.Service/Method` with JSON in, a Response with JSON out."

    def send(  # as requests has it; the deadline stands for timeout
        self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None,
        verify: bool | str = True, cert: Any = None, proxies: Any = None,
    ) -> requests.Response:  # fmt: skip
        url = urlsplit(str(request.url))
        method, host = url.path[1:], url.hostname or ""
        if method + ">" not in _table()[0]:
            raise ConfigError(f"{method} is not in the table of gRPC methods")
        message = _encode_message(method, json.loads(request.body or b"{}"))
        exchange, secure, via = _THREAD.exchange, url.scheme == "grpcs", url
        proxy = select_proxy(f"http{'s' * secure}://{host}", proxies)
        if proxy:
            via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            plain = re.fullmatch(r"(.*@)?(\[.*\]|[^:]+)(:\d+)?", via.netloc)
            if via.scheme != "http" or not plain:  # its URL may hold a password: it is not shown
                raise ConfigError(f"gRPC takes a proxy as http://host:port, not {via.scheme}://…")
        try:
            port = url.port or (443 if secure else 80)
            hop = via.hostname or "", via.port or (80 if proxy else port)
            sock = _connect(*hop, exchange.deadline)
            with closing(_H2Call(sock, exchange)) as call:
                if proxy:
                    call.ask_proxy(via, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
                if secure:
                    call.start_tls(host, verify)
                headers = _metadata(url, request.headers, exchange.deadline.left())
                call.run(headers, struct.pack(">BI", 0, len(message)) + message)
            return _grpc_answer(request, method, call)
        except YandexGPTError:
            raise
        except ssl.SSLCertVerificationError as error:
            hint = "verify= takes the path of the CA bundle it can be checked with"
            raise ConnectionFailed(f"{host}: {error}: {hint}", retry=False) from error
        except _BROKEN as error:
            if isinstance(error, socket.timeout) and error.errno is None:
                raise DeadlineExceeded(f"{host} did not answer in time") from error
            raise ConnectionFailed(f"{host}, {method}: {error}") from error

    def close(self) -> None:
        "Nothing to do: each call closes its connection."


def _metadata(url: Any, given: Any, left: float | None) -> dict[str, str]:
    headers = {":method": "POST", ":scheme": "https" if url.scheme == "grpcs" else "http"}
    headers.update({":path": url.path, ":authority": url.netloc.rpartition("@")[2]})
    headers.update({"te": "trailers", "content-type": "application/grpc"})
    if left is not None:
        headers["grpc-timeout"] = f"{min(int(left * 1000) + 1, 99_999_999)}m"
    lower = {key.lower(): value for key, value in given.items()}
    rest = {key: value for key, value in lower.items() if key not in _HTTP1}
    return {**headers, "grpc-accept-encoding": "identity", **rest}


def _grpc_answer(request: requests.PreparedRequest, method: str, call: _H2Call) -> requests.Response:
    response, headers, body = requests.Response(), call.headers, bytes(call.body)
    status = int(headers[":status"])
    if "grpc-status" in headers:
        code = int(headers["grpc-status"])
        status = _HTTP_STATUS[code] if 0 <= code <= 16 else 500
        error = {"grpcCode": code, "httpCode": status, "httpStatus": _PHRASES.get(status, "")}
        error.update(message=unquote(headers.get("grpc-message", "")), details=[])
        if code == 0 and (body[:1] != b"\0" or len(body) != 5 + int.from_bytes(body[1:5], "big")):
            raise ValueError("the answer is compressed, or is not one whole message")
        answer = {"error": error} if code else _decode_message(method + ">", body[5:])
        headers["content-type"], body = "application/json", json.dumps(answer).encode()
    elif status == 200:
        raise ValueError("the answer ends without a grpc-status")
    response.status_code, response.url, response.request = status, str(request.url), request
    response.raw, response.encoding = io.BytesIO(body), "utf-8"
    response.headers.update({key: headers[key] for key in headers if key and key[0] != ":"})
    response.headers.pop("content-length", None)  # of the frames, not of this body
    return response


if __name__ == "__main__":
    raise SystemExit(main())
