"""Tests of yandex_gpt, and LocalYandexGPT: the service's own API on this machine.

As tests:   pip install '.[test]' && pytest
As a demo:  python test_yandex_gpt.py                      (needs requests alone)
As a server for scripts and lessons of your own:
            python test_yandex_gpt.py serve --port 8080
            YANDEX_GPT_ENDPOINT=http://127.0.0.1:8080 yandex-gpt "hello"

LocalYandexGPT speaks REST (HTTP/1.1) and gRPC (HTTP/2 without TLS) on one loopback port, with
the standard library alone. It frames, packs and parses everything by itself: a stand-in that
borrowed the module's code would agree with the module's mistakes.
"""
# SPDX-License-Identifier: MIT-0

from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import copy
import gzip
import hashlib
import http.client
import itertools
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, ClassVar, NamedTuple

JSON = dict[str, Any]

# --- Stand-in: refusals --------------------------------------------------------

HTTP_STATUS = {
    1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429,
    9: 400, 10: 409, 11: 400, 12: 501, 13: 500, 14: 503, 15: 500, 16: 401,
}
GRPC_CODE = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 409: 6, 429: 8, 500: 13, 501: 12, 502: 14,
             503: 14, 504: 4}
REASON = {**http.client.responses, 499: "Client Closed Request"}


class Refused(Exception):
    "The service's refusal: a gRPC code and a message, worded for each API where it is sent."

    def __init__(self, code: int, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.status = status or HTTP_STATUS[code]

    def body(self, path: str) -> JSON:
        if path.startswith("/v1/"):
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
            return {"error": {"message": self.message, "type": kind, "param": None,
                              "code": "invalid_api_key" if self.code == 16 else str(self.status)}}
        if path.startswith(("/operations/", "/iam/")):
            return {"code": self.code, "message": self.message, "details": []}
        return {"error": {"grpcCode": self.code, "httpCode": self.status, "message": self.message,
                          "httpStatus": REASON.get(self.status, ""), "details": []}}


class Gone(Exception):
    "The client hung up, or the server is closing: nothing more can be said on this connection."


def require(condition: object, message: str, code: int = 3) -> None:
    if not condition:
        raise Refused(code, message)


# --- Stand-in: protobuf --------------------------------------------------------
# A message a line: name:number:type. "*" is repeated; "|x" puts a field into the oneof x.

MESSAGES = """
CompletionRequest modelUri:1:string completionOptions:2:CompletionOptions messages:3:*Message tools:4:*Tool jsonObject:5:bool|format jsonSchema:6:JsonSchema|format parallelToolCalls:7:BoolValue toolChoice:8:ToolChoice
CompletionOptions stream:1:bool temperature:2:DoubleValue maxTokens:3:Int64Value reasoningOptions:4:ReasoningOptions
ReasoningOptions mode:1:ReasoningMode
Message role:1:string text:2:string|content toolCallList:3:ToolCallList|content toolResultList:4:ToolResultList|content
ToolCallList toolCalls:1:*ToolCall
ToolCall functionCall:1:FunctionCall
FunctionCall name:1:string arguments:2:Struct
ToolResultList toolResults:1:*ToolResult
ToolResult functionResult:1:FunctionResult
FunctionResult name:1:string content:2:string|content
Tool function:1:FunctionTool
FunctionTool name:1:string description:2:string parameters:3:Struct strict:4:bool
JsonSchema schema:1:Struct
CompletionResponse alternatives:1:*Alternative usage:2:Usage modelVersion:3:string
Alternative message:1:Message status:2:AlternativeStatus
Usage inputTextTokens:1:int64 completionTokens:2:int64 totalTokens:3:int64 completionTokensDetails:4:UsageDetails
UsageDetails reasoningTokens:1:int64
ToolChoice mode:1:ToolChoiceMode|choice functionName:2:string|choice
TokenizeRequest modelUri:1:string text:2:string
BatchCompletionRequest modelUri:1:string completionOptions:2:CompletionOptions sourceDatasetId:3:string jsonObject:4:bool|format jsonSchema:5:JsonSchema|format
BatchCompletionMetadata taskId:1:string taskStatus:2:TaskStatus completedBatches:3:int64 totalBatches:4:int64
BatchCompletionResponse taskId:1:string taskStatus:2:TaskStatus resultDatasetId:3:string
Operation id:1:string description:2:string createdAt:3:Timestamp createdBy:4:string modifiedAt:5:Timestamp done:6:bool metadata:7:Any error:8:Status|result response:9:Any|result
OperationId operationId:1:string
Status code:1:int32 message:2:string details:3:*Any
TuningRequest baseModelUri:1:string trainDatasets:2:*WeightedDataset validationDatasets:3:*WeightedDataset textToTextCompletion:100:TuningParams|params name:200:string description:201:string labels:202:map
WeightedDataset datasetId:1:string weight:2:double
TuningParams seed:1:int64 lr:2:double nSamples:3:int64 additionalArguments:7:string lora:100:Lora|type promptTune:101:PromptTune|type scheduler:200:Scheduler optimizer:201:Optimizer
Lora rank:1:int64 alpha:2:double initialization:3:string type:4:string
PromptTune virtualTokens:1:int64
Scheduler linear:1:MinLr|type constant:2:Empty|type cosine:3:MinLr|type warmupRatio:101:double
MinLr minLr:1:double
Empty
Optimizer adamw:1:AdamW
AdamW beta1:1:double beta2:2:double eps:3:double weightDecay:4:double
TuningMetadata tuningTaskId:1:string status:2:TuningStatus totalSteps:3:int64 currentStep:4:int64
TuningResponse tuningTaskId:3:string status:4:TuningStatus targetModelUri:5:string
TuningTask taskId:1:string operationId:3:string status:4:TuningStatus folderId:5:string createdBy:6:string createdAt:7:Timestamp startedAt:8:Timestamp finishedAt:9:Timestamp sourceModelUri:10:string targetModelUri:11:string name:12:string description:13:string labels:14:map
TuningTaskId tuningTaskId:1:string
TuningDescription tuningTask:1:TuningTask
ListTuningsRequest folderId:1:string pageSize:2:int64 pageToken:3:string status:4:TuningStatus
ListTuningsResponse tuningTasks:1:*TuningTask nextPageToken:2:string
MetricsUrl loadUrl:1:string
CreateDatasetRequest name:1:string folderId:2:string description:3:string metadata:4:string taskType:5:string labels:6:map uploadFormat:7:string allowDataLog:8:bool
CreateDatasetResponse datasetId:1:string dataset:2:DatasetInfo
DatasetInfo datasetId:1:string folderId:2:string name:3:string description:4:string metadata:5:string status:6:DatasetStatus taskType:7:string createdAt:8:Timestamp updatedAt:9:Timestamp rows:10:int64 sizeBytes:11:int64 createdById:12:string labels:13:map createdBy:14:string updatedBy:15:string validationError:21:*ValidationError allowDataLog:22:bool
ValidationError error:1:string errorDescription:2:string rowNumbers:3:*int64
DatasetId datasetId:1:string
DatasetDescription dataset:1:DatasetInfo
DraftUrlRequest datasetId:1:string sizeBytes:2:int64
DraftUrl datasetId:1:string uploadUrl:2:string
StartMultipartRequest datasetId:1:string sizeBytes:2:int64 parts:3:int64
StartMultipartResponse datasetId:1:string multipartUploadUrls:2:*string
FinishMultipartRequest datasetId:1:string uploadedParts:2:*UploadedPart
UploadedPart partNum:1:int64 etag:2:string
ValidateDatasetMetadata datasetId:1:string validRows:2:int64 processedRows:3:int64 totalRows:4:int64
ValidateDatasetResponse datasetId:1:string isValid:2:bool errors:3:*ValidationError
ListDatasetsRequest folderId:1:string status:2:*DatasetStatus datasetNamePattern:3:string taskTypeFilter:4:*string pageSize:5:int64 pageToken:6:string datasetIds:7:*string
ListDatasetsResponse datasets:1:*DatasetInfo nextPageToken:2:string
DownloadUrls datasetId:1:string downloadUrls:2:*DownloadUrl
DownloadUrl key:1:string url:2:string
TaskId taskId:1:string
BatchDescription task:1:BatchTask
BatchTask taskId:1:string operationId:2:string folderId:3:string modelUri:4:string sourceDatasetId:5:string completionRequest:6:BatchRequest|request status:7:TaskStatus resultDatasetId:8:string labels:9:map createdBy:10:string createdAt:11:Timestamp startedAt:12:Timestamp finishedAt:13:Timestamp errors:14:BatchErrors
BatchRequest modelUri:1:string sourceDatasetId:2:string completionOptions:3:BatchOptions dataLoggingEnabled:4:bool jsonObject:5:bool|format jsonSchema:6:JsonSchema|format
BatchOptions temperature:1:DoubleValue maxTokens:2:Int64Value reasoningOptions:3:ReasoningOptions
BatchErrors status:1:Status lineErrors:2:*LineError batchErrors:3:*BatchError
LineError lineNumber:1:int64 message:2:string
BatchError batchNumber:1:int64 firstLine:2:int64 lastLine:3:int64 message:4:string
"""

TASK = ["STATUS_UNSPECIFIED", "CREATED", "PENDING", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELED"]
ENUMS: dict[str, list[str]] = {
    "AlternativeStatus": ["ALTERNATIVE_STATUS_" + name for name in (
        "UNSPECIFIED", "PARTIAL", "TRUNCATED_FINAL", "FINAL", "CONTENT_FILTER", "TOOL_CALLS")],
    "ReasoningMode": ["REASONING_MODE_UNSPECIFIED", "DISABLED", "ENABLED_HIDDEN"],
    "ToolChoiceMode": ["TOOL_CHOICE_MODE_UNSPECIFIED", "NONE", "AUTO", "REQUIRED"],
    "DatasetStatus": ["STATUS_UNSPECIFIED", "DRAFT", "VALIDATING", "READY", "INVALID", "DELETING"],
    "TuningStatus": [*TASK, "DRAFT", "ARCHIVED", "PAID"],
    "TaskStatus": TASK,
}
TYPE_URL = "type.googleapis.com/yandex.cloud.ai."
ANY = {  # what an Any may hold here: its full name under yandex.cloud.ai
    "foundation_models.v1.CompletionResponse": "CompletionResponse",
    "tuning.v1.TuningMetadata": "TuningMetadata",
    "tuning.v1.TuningResponse": "TuningResponse",
    "dataset.v1.ValidateDatasetMetadata": "ValidateDatasetMetadata",
    "dataset.v1.ValidateDatasetResponse": "ValidateDatasetResponse",
    "foundation_models.v1.BatchCompletionMetadata": "BatchCompletionMetadata",
    "foundation_models.v1.BatchCompletionResponse": "BatchCompletionResponse",
}


class Field(NamedTuple):
    name: str
    number: int
    type: str
    repeated: bool
    oneof: str


def _field(text: str) -> Field:
    name, number, kind = text.split(":")
    kind, _, oneof = kind.partition("|")
    return Field(name, int(number), kind.lstrip("*"), kind.startswith("*"), oneof)


FIELDS: dict[str, list[Field]] = {
    line.split()[0]: [_field(text) for text in line.split()[1:]]
    for line in MESSAGES.strip().splitlines()
}
WIRE_TYPE = {"int64": 0, "int32": 0, "bool": 0, "double": 1, **dict.fromkeys(ENUMS, 0)}


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def tagged(number: int, wire_type: int, payload: bytes) -> bytes:
    size = varint(len(payload)) if wire_type == 2 else b""
    return varint(number << 3 | wire_type) + size + payload


def encode(message: str, value: JSON) -> bytes:
    """Proto3 JSON to the wire, as strict as the service's own parser: unknown fields, wrong types
    and unknown enum names are refused in its words."""
    if not isinstance(value, dict):
        raise Refused(3, f"proto: syntax error (line 1:1): unexpected token {json.dumps(value)}")
    by_name = {field.name: field for field in FIELDS[message]}
    out = b""
    chosen: dict[str, str] = {}  # the field of each oneof
    for key, item in value.items():
        field = by_name.get(re.sub("_([a-z])", lambda found: found[1].upper(), key))
        if field is None:
            raise Refused(3, f'proto: (line 1:2): unknown field "{key}"')
        if item is None:
            continue
        if field.oneof:
            require(chosen.setdefault(field.oneof, field.name) == field.name,
                    f'proto: (line 1:2): error parsing "{key}", oneof is already set')
        if not field.repeated:
            out += _encode_one(field, item, keep_default=bool(field.oneof))
            continue
        require(isinstance(item, list), f"proto: (line 1:2): unexpected token {json.dumps(item)}")
        if field.type in WIRE_TYPE:  # repeated numbers are packed
            packed = b"".join(_scalar(field, each) for each in item)
            out += tagged(field.number, 2, packed) if packed else b""
        else:
            out += b"".join(_encode_one(field, each, keep_default=True) for each in item)
    return out


def _encode_one(field: Field, item: Any, *, keep_default: bool) -> bytes:
    if field.type == "map":
        require(isinstance(item, dict), f"invalid value for map field {field.name}")
        string = field._replace(type="string")
        entries = (tagged(1, 2, _scalar(string, name)) + tagged(2, 2, _scalar(string, text))
                   for name, text in item.items())
        return b"".join(tagged(field.number, 2, entry) for entry in entries)
    if field.type in FIELDS:
        return tagged(field.number, 2, encode(field.type, item))
    if field.type in WELL_KNOWN:
        return tagged(field.number, 2, WELL_KNOWN[field.type][0](field, item))
    payload = _scalar(field, item)
    if not keep_default and not payload.strip(b"\0"):
        return b""  # proto3 leaves zeros and empty strings out
    return tagged(field.number, WIRE_TYPE.get(field.type, 2), payload)


def _scalar(field: Field, item: Any) -> bytes:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number = not isinstance(item, bool) and isinstance(item, (int, float, str))
        if field.type == "string" and isinstance(item, str):
            return item.encode()
        if field.type == "bool" and isinstance(item, bool):
            return varint(item)
        if field.type == "double" and number:
            return struct.pack("<d", float(item))
        if field.type in ("int64", "int32") and number and float(item) == int(float(item)):
            whole = int(item)
            bits = int(field.type[3:]) - 1
            if -(1 << bits) <= whole < 1 << bits:
                return varint(whole)
        if field.type in ENUMS and number:
            names = ENUMS[field.type]
            return varint(item if isinstance(item, int) else names.index(item))
    kind = "enum" if field.type in ENUMS else field.type
    raise Refused(3, f"proto: (line 1:2): invalid value for {kind} field {field.name}: "
                     + json.dumps(item)[:100])


def wire_fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    "(number, wire type, payload) of each field; ValueError when the bytes are no message."
    at = 0

    def read_varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("truncated varint")
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    while at < len(data):
        key = read_varint()
        wire_type = key & 7
        payload: Any
        if wire_type == 0:
            payload = read_varint()
        else:
            size = {1: 8, 5: 4}.get(wire_type) or (read_varint() if wire_type == 2 else -1)
            if size < 0 or at + size > len(data):
                raise ValueError("truncated field")
            payload = data[at : at + size]
            at += size
        yield key >> 3, wire_type, payload


def decode(message: str, data: bytes) -> JSON:
    "The wire to proto3 JSON; unset fields are left out, unknown ones skipped."
    by_number = {field.number: field for field in FIELDS[message]}
    out: JSON = {}
    for number, wire_type, payload in wire_fields(data):
        field = by_number.get(number)
        if field is None:
            continue
        if field.type == "map":
            entry = {n: text.decode() for n, _, text in wire_fields(payload)}
            out.setdefault(field.name, {})[entry.get(1, "")] = entry.get(2, "")
        elif field.repeated and wire_type == 2 and field.type in WIRE_TYPE:
            items = re.findall(rb"[\x80-\xff]*[\0-\x7f]", payload)  # varints, end to end
            fields = wire_fields(b"".join(b"\x08" + item for item in items))
            out.setdefault(field.name, []).extend(_from_wire(field, item) for _, _, item in fields)
        elif field.repeated:
            out.setdefault(field.name, []).append(_from_wire(field, payload))
        else:
            for other in FIELDS[message]:
                if field.oneof and other.oneof == field.oneof:
                    out.pop(other.name, None)
            out[field.name] = _from_wire(field, payload)
    return out


def _from_wire(field: Field, payload: Any) -> Any:
    if field.type in FIELDS:
        return decode(field.type, payload)
    if field.type in WELL_KNOWN:
        return WELL_KNOWN[field.type][1](payload)
    if field.type == "string":
        return payload.decode()
    if field.type == "double":
        return struct.unpack("<d", payload)[0]
    if field.type == "bool":
        return bool(payload)
    if field.type in ENUMS:
        names = ENUMS[field.type]
        return names[payload] if payload < len(names) else payload
    signed = payload - (1 << 64) if payload >> 63 else payload
    return str(signed) if field.type == "int64" else signed


def _encode_timestamp(field: Field, text: str) -> bytes:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    seconds, nanos = varint(int(moment.timestamp())), varint(moment.microsecond * 1000)
    return tagged(1, 0, seconds) + tagged(2, 0, nanos)


def _decode_timestamp(data: bytes) -> str:
    parts = {number: payload for number, _, payload in wire_fields(data)}
    moment = datetime.fromtimestamp(parts.get(1, 0), timezone.utc)
    return moment.replace(microsecond=parts.get(2, 0) // 1000).isoformat().replace("+00:00", "Z")


def _encode_any(field: Field, value: JSON) -> bytes:
    name = value["@type"].rpartition("yandex.cloud.ai.")[2]
    inner = {key: item for key, item in value.items() if key != "@type"}
    return tagged(1, 2, (TYPE_URL + name).encode()) + tagged(2, 2, encode(ANY[name], inner))


def _decode_any(data: bytes) -> JSON:
    parts = {number: payload for number, _, payload in wire_fields(data)}
    url = parts.get(1, b"").decode()
    return {"@type": url, **decode(ANY[url.rpartition("yandex.cloud.ai.")[2]], parts.get(2, b""))}


def _encode_struct(field: Field, value: Any) -> bytes:
    require(isinstance(value, dict), f"proto: (line 1:2): unexpected token {json.dumps(value)}")
    return b"".join(
        tagged(1, 2, tagged(1, 2, key.encode()) + tagged(2, 2, _encode_value(item)))
        for key, item in value.items()
    )


def _encode_value(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return tagged(1, 0, b"\0") if value is None else tagged(4, 0, varint(value))
    if isinstance(value, (int, float)):
        return tagged(2, 1, struct.pack("<d", value))
    if isinstance(value, str):
        return tagged(3, 2, value.encode())
    if isinstance(value, dict):
        return tagged(5, 2, _encode_struct(Field("", 5, "Struct", False, ""), value))
    return tagged(6, 2, b"".join(tagged(1, 2, _encode_value(item)) for item in value))


def _decode_struct(data: bytes) -> JSON:
    out = {}
    for _, _, payload in wire_fields(data):
        entry = {number: part for number, _, part in wire_fields(payload)}
        out[entry.get(1, b"").decode()] = _decode_value(entry.get(2, b""))
    return out


def _decode_value(data: bytes) -> Any:
    value: Any = None
    for number, _, payload in wire_fields(data):
        value = VALUE_KINDS[number](payload)
    return value


VALUE_KINDS: dict[int, Callable[[Any], Any]] = {
    1: lambda payload: None,
    2: lambda payload: struct.unpack("<d", payload)[0],  # a Struct has only doubles: 5 is 5.0
    3: lambda payload: payload.decode(),
    4: bool,
    5: _decode_struct,
    6: lambda payload: [_decode_value(item) for _, _, item in wire_fields(payload)],
}


def _wrapper(kind: str) -> tuple[Callable[[Field, Any], bytes], Callable[[bytes], Any]]:
    "google.protobuf.BoolValue and its like: a message around one scalar; in JSON the bare scalar."
    inner = Field("value", 1, kind, False, "")
    zero: Any = {"bool": False, "double": 0.0, "int64": "0"}[kind]

    def pack(field: Field, item: Any) -> bytes:
        return _encode_one(inner._replace(name=field.name), item, keep_default=False)

    def unpack(data: bytes) -> Any:
        return next((_from_wire(inner, payload) for _, _, payload in wire_fields(data)), zero)

    return pack, unpack


WELL_KNOWN: dict[str, tuple[Callable[[Field, Any], bytes], Callable[[bytes], Any]]] = {
    "Timestamp": (_encode_timestamp, _decode_timestamp),
    "Any": (_encode_any, _decode_any),
    "Struct": (_encode_struct, _decode_struct),
    "BoolValue": _wrapper("bool"),
    "DoubleValue": _wrapper("double"),
    "Int64Value": _wrapper("int64"),
}

# --- Stand-in: header compression of HTTP/2 (RFC 7541) -------------------------

STATIC_TABLE = [(name, value.replace("&", " ")) for name, _, value in (
    entry.partition("=") for entry in re.findall(r"\S+", """
:authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https
:status=200 :status=204 :status=206 :status=304 :status=400 :status=404 :status=500
accept-charset accept-encoding=gzip,&deflate accept-language accept-ranges accept
access-control-allow-origin age allow authorization cache-control content-disposition
content-encoding content-language content-length content-location content-range content-type
cookie date etag expect expires from host if-match if-modified-since if-none-match if-range
if-unmodified-since last-modified link location max-forwards proxy-authenticate
proxy-authorization range referer refresh retry-after server set-cookie strict-transport-security
transfer-encoding user-agent vary via www-authenticate
"""))]

# Symbols in the order of their codes, by the length of the code in bits; 256 ends the string.
HUFFMAN_SYMBOLS: dict[int, Iterable[int]] = {
    5: b"012aceiost", 6: b" %-./3456789=A_bdfghlmnpru", 7: b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: b"&*,;XZ", 10: b'!"()?', 11: b"'+|", 12: b"#>", 13: b"\0$@[]~", 14: b"^}", 15: b"<`{",
    19: b"\\\xc3\xd0", 20: b"\x80\x82\x83\xa2\xb8\xc2\xe0\xe2",
    21: b"\x99\xa1\xa7\xac\xb0\xb1\xb3\xd1\xd8\xd9\xe3\xe5\xe6",
    22: b"\x81\x84\x85\x86\x88\x92\x9a\x9c\xa0\xa3\xa4\xa9\xaa\xad\xb2\xb5\xb9\xba\xbb\xbd\xbe\xc4"
        b"\xc6\xe4\xe8\xe9",
    23: b"\x01\x87\x89\x8a\x8b\x8c\x8d\x8f\x93\x95\x96\x97\x98\x9b\x9d\x9e\xa5\xa6\xa8\xae\xaf\xb4"
        b"\xb6\xb7\xbc\xbf\xc5\xe7\xef",
    24: b"\x09\x8e\x90\x91\x94\x9f\xab\xce\xd7\xe1\xec\xed", 25: b"\xc7\xcf\xea\xeb",
    26: b"\xc0\xc1\xc8\xc9\xca\xcd\xd2\xd5\xda\xdb\xee\xf0\xf2\xf3\xff",
    27: b"\xcb\xcc\xd3\xd4\xd6\xdd\xde\xdf\xf1\xf4\xf5\xf6\xf7\xf8\xfa\xfb\xfc\xfd\xfe",
    28: b"\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f\x10\x11\x12\x13\x14\x15\x17\x18\x19\x1a\x1b"
        b"\x1c\x1d\x1e\x1f\x7f\xdc\xf9",
    30: (10, 13, 22, 256),
}


def _huffman_codes() -> Iterator[tuple[tuple[int, int], int]]:
    "((length, code), symbol): within a length the codes count up, and a longer one carries on."
    code = last = 0
    for length, symbols in HUFFMAN_SYMBOLS.items():
        code, last = code << (length - last), length
        for symbol in symbols:
            yield (length, code), symbol
            code += 1


HUFFMAN = dict(_huffman_codes())


def unhuffman(data: bytes) -> bytes:
    out = bytearray()
    code = length = 0
    for bit in (byte >> shift & 1 for byte in data for shift in range(7, -1, -1)):
        code, length = code << 1 | bit, length + 1
        symbol = HUFFMAN.get((length, code))
        if symbol is not None:
            out.append(symbol)  # ValueError for 256: the end must not be coded
            code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise ValueError("the padding of a Huffman string is not the end's first bits")
    return bytes(out)


class HeaderDecoder:
    "One per connection: the dynamic table is the peer's memory of what it sent before."

    def __init__(self) -> None:
        self.dynamic: list[tuple[str, str]] = []
        self.limit = 4096

    def decode(self, block: bytes) -> list[tuple[str, str]]:
        headers, at = [], 0

        def number(bits: int) -> int:
            nonlocal at
            value = block[at] & ((1 << bits) - 1)
            at += 1
            shift = 0
            while value >= (1 << bits) - 1:
                byte = block[at]
                at += 1
                value += (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            return value

        def text() -> str:
            nonlocal at
            coded = block[at] & 0x80
            size = number(7)
            raw = block[at : at + size]
            at += size
            return (unhuffman(raw) if coded else raw).decode("latin-1")

        while at < len(block):
            first = block[at]
            if first & 0x80:
                headers.append((STATIC_TABLE + self.dynamic)[number(7) - 1])
            elif first & 0xE0 == 0x20:
                self.limit = number(5)
            else:
                index = number(6 if first & 0x40 else 4)
                name = (STATIC_TABLE + self.dynamic)[index - 1][0] if index else text()
                headers.append((name, text()))
                if first & 0x40:
                    self.dynamic.insert(0, headers[-1])
            while sum(len(name) + len(value) + 32 for name, value in self.dynamic) > self.limit:
                self.dynamic.pop()
        return headers


def encode_headers(headers: Iterable[tuple[str, str]]) -> bytes:
    "Every header as a literal that nobody need remember."
    out = b""
    for pair in headers:
        out += b"\0"
        for text in pair:
            size = len(text)
            if size < 127:
                out += bytes([size])
            else:
                out += b"\x7f" + varint(size - 127)
            out += text.encode("latin-1")
    return out


# --- Stand-in: the model that answers ------------------------------------------

CANNED = {
    "why is the sky blue": "The sky is blue because air scatters the short waves of sunlight more "
    "than the long ones (Rayleigh scattering).",
    "hello": "Hello! How can I help you?",
    "what is the capital of russia": "The capital of Russia is Moscow.",
}


TOKEN = re.compile(r" ?\w{1,6}|[^\w\s]|\s")  # a piece of a word, a sign, a white space


def tokens(text: str) -> list[str]:
    "Joined, they are the text again."
    return TOKEN.findall(text)


def count_tokens(text: str) -> int:
    return TOKEN.subn("", text)[1]  # makes no list: a text may be 64 MB


class Prompt(NamedTuple):
    "What a request of either API asks, in one form."

    texts: list[str]  # what the user said, oldest first; the last one is the question
    results: list[str]  # of the tools, when they are what the conversation ends with
    tools: list[JSON]  # {"name", "parameters"}
    choice: str  # NONE, AUTO, REQUIRED or the name of a function
    parallel: bool
    schema: JSON | None  # of the answer; {} is any JSON


def think(prompt: Prompt) -> str | list[tuple[str, JSON]]:
    "The answer to a prompt: a text, or the (name, arguments) of tool calls. Always the same one."
    question = prompt.texts[-1] if prompt.texts else ""
    wanted = prompt.tools if prompt.choice != "NONE" else []
    if prompt.choice not in ("NONE", "AUTO", "REQUIRED"):
        wanted = [tool for tool in prompt.tools if tool["name"] == prompt.choice]
        require(wanted, f"tool_choice names an unknown function: {prompt.choice}")
    if wanted and (not prompt.results or prompt.choice == "REQUIRED"):
        named = [tool for tool in wanted if tool["name"].lower() in question.lower()]
        tool = (named or wanted)[0]
        schema = tool.get("parameters") or {}
        pair = re.search(r"(\w+) and (\w+)", question) if prompt.parallel else None
        if pair is None:
            return [(tool["name"], synthesize(schema, question))]
        ways = [question.replace(pair[0], word) for word in pair.groups()]
        return [(tool["name"], synthesize(schema, each, (word,)))
                for each, word in zip(ways, pair.groups())]
    if prompt.schema is not None:
        value = synthesize(prompt.schema, question) if prompt.schema else {"answer": question}
        return json.dumps(value, ensure_ascii=False)
    if prompt.results:
        return "The tools say: " + "; ".join(prompt.results)
    key = question.strip(" ?!.").lower()
    if key in CANNED:
        return CANNED[key]
    if re.match(r"summari[sz]e", key):
        words = re.sub(r"^\W*summari[sz]e\s*(this)?\W*", "", question, flags=re.I).split()
        return "Summary: " + " ".join(words[:12]) + ("…" if len(words) > 12 else "")
    earlier = len(prompt.texts) - 1
    return f"You said: {question}" + (f" (after {earlier} earlier turns)" if earlier > 0 else "")


def synthesize(schema: JSON, text: str, words: Iterable[str] = ()) -> Any:
    "A value that the schema allows, its words and numbers taken from the text where there are any."
    inside = re.findall(r"(?<!^)(?<![.!?] )\b[A-ZА-ЯЁ]\w+", text)
    others = sorted(re.findall(r"[^\W\d]+", text), key=len, reverse=True)
    found = itertools.cycle([*words] or inside or others[:1] or ["text"])
    numbers = itertools.chain(re.findall(r"-?\d+(?:\.\d+)?", text), itertools.repeat("1"))

    def number(at: JSON, kind: type) -> Any:
        value = float(next(numbers))
        if "minimum" in at or "exclusiveMinimum" in at:
            value = max(value, at.get("minimum", value), at.get("exclusiveMinimum", value - 1) + 1)
        if "maximum" in at or "exclusiveMaximum" in at:
            value = min(value, at.get("maximum", value), at.get("exclusiveMaximum", value + 1) - 1)
        return kind(value)

    def string(at: JSON) -> str:
        value = {"date": "2025-01-31", "time": "12:00:00Z", "date-time": "2025-01-31T12:00:00Z",
                 "uuid": str(uuid.UUID(int=0)), "email": "user@example.com",
                 "uri": "https://example.com"}.get(at.get("format", "")) or next(found)
        return value.ljust(at.get("minLength", 0), "x")[: at.get("maxLength")]

    def array(at: JSON, depth: int) -> list[Any]:
        if "prefixItems" in at:
            return [value(item, depth) for item in at["prefixItems"]]
        return [value(at.get("items") or {}, depth) for _ in range(max(1, at.get("minItems", 1)))]

    def members(at: JSON, depth: int) -> JSON:
        properties = at.get("properties", {})
        kept = at.get("required", []) if depth > 8 else properties  # an end to recursive schemas
        out = {key: value(properties.get(key, {}), depth) for key in kept}
        if not properties and isinstance(at.get("additionalProperties"), dict):
            out[next(found)] = value(at["additionalProperties"], depth)
        return out

    def value(at: Any, depth: int) -> Any:
        depth += 1
        require(isinstance(at, dict) and depth < 40, "invalid JSON schema")
        if "$ref" in at:
            target: Any = schema
            for part in at["$ref"].lstrip("#/").split("/") if at["$ref"] != "#" else []:
                target = target.get(part) if isinstance(target, dict) else None
            require(isinstance(target, dict), f"invalid JSON schema: no {at['$ref']}")
            return value(target, depth)
        if at.get("enum"):
            return at["enum"][0]
        if "const" in at:
            return at["const"]
        for many in ("anyOf", "oneOf"):
            if many in at:
                real = [option for option in at[many] if option.get("type") != "null"]
                return value(real[0], depth) if real and depth < 8 else None
        if "allOf" in at:
            parts = [value(part, depth) for part in at["allOf"]]
            objects = [part.items() for part in parts if isinstance(part, dict)]
            return dict(itertools.chain(*objects)) or parts[0]
        kind = at.get("type", "object" if "properties" in at else "string")
        if isinstance(kind, list):
            kind = next((each for each in kind if each != "null"), "null")
        makers: dict[str, Callable[[], Any]] = {
            "object": lambda: members(at, depth), "array": lambda: array(at, depth),
            "integer": lambda: number(at, int), "number": lambda: number(at, float),
            "string": lambda: string(at), "boolean": lambda: True, "null": lambda: None,
        }
        require(kind in makers, f"invalid JSON schema: unknown type {kind}")
        return makers[kind]()

    try:
        return value(schema, 0)
    except (TypeError, AttributeError, ValueError) as error:
        raise Refused(3, f"invalid JSON schema: {error}") from error


# --- Stand-in: requests, answers, faults ---------------------------------------


@dataclass
class Recorded:
    "A request as it came. Header names are in lower case; `json` is None where there is none."

    method: str
    path: str
    headers: dict[str, str]
    connection: int  # a number for each TCP connection
    at: float  # time.monotonic() when its head had been read
    body: bytes = b""
    json: Any = None
    size: int = 0  # of the body; an upload's goes to disk, and `body` stays empty
    fault: Fault | None = None


class Answer(NamedTuple):
    "body: all of it, or an iterator of the pieces to flush one by one."

    body: bytes | Iterator[bytes]
    status: int = 200
    headers: dict[str, str] = {"Content-Type": "application/json"}


def answer(value: JSON, status: int = 200) -> Answer:
    return Answer(json.dumps(value, ensure_ascii=False).encode(), status)


class Fault:
    """What happens to one request instead of, or with, its normal answer. As it is, nothing does.

    `http` and `grpc` get the connection and a function that does the work and gives the answer:
    a fault that never calls it is one where the service did not take the request."""

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        wire.send(work())

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        call.answer(work())

    def __repr__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({inner})"


class Reply(Fault):
    "This answer: a dict is sent as JSON, a str as HTML. Over gRPC its status becomes a code."

    def __init__(
        self,
        status: int,
        body: JSON | str | bytes | None = None,
        headers: dict[str, str] | None = None,
        retry_after: float | str | None = None,
    ) -> None:
        self.status, self.body, self.headers = status, body, dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        body, kind = self.body, "application/json"
        if body is None and self.status >= 400:
            code, message = GRPC_CODE.get(self.status, 2), REASON.get(self.status, "Error")
            body = Refused(code, message, self.status).body(wire.path)
        if isinstance(body, str):
            body, kind = body.encode(), "text/html; charset=utf-8"
        elif not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
        wire.send(Answer(body, self.status, {"Content-Type": kind, **self.headers}))

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        error: Any = self.body if isinstance(self.body, dict) else {"message": self.body}
        error = error.get("error", error)
        code = error.get("grpcCode", error.get("code", GRPC_CODE.get(self.status, 2)))
        message = error.get("message") or REASON.get(self.status, "Error")
        headers = {key.lower(): value for key, value in self.headers.items()}
        call.refuse(Refused(code, message), headers)


class Reset(Fault):
    """The connection is reset once the request was read, and the work done if `taken`; with
    `before`, as soon as the request's head arrives. Over gRPC, `code` resets the stream alone."""

    def __init__(self, before: bool = False, taken: bool = True, code: int | None = None) -> None:
        self.before, self.taken, self.code = before, taken, code

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        if self.taken and not self.before:
            work()
        wire.drop(reset=True)

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        if self.taken and not self.before:
            work()
        if self.code is None:
            call.wire.drop(reset=True)
        call.wire.frame(3, 0, call.stream, struct.pack(">I", self.code))


class GoAway(Fault):
    "Over gRPC: the server shuts the connection down and says it took nothing after `last`."

    def __init__(self, last: int = 0, code: int = 0) -> None:
        self.last, self.code = last, code

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        call.wire.frame(7, 0, 0, struct.pack(">II", self.last, self.code))
        call.wire.drop()


class Stall(Fault):
    "Silence for so many seconds (None: until release() or close()), then the normal answer."

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        wire.pause(self.seconds)
        wire.send(work())

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        call.wire.pause(self.seconds)
        call.answer(work())


class Cut(Fault):
    "The connection ends after so many bytes of the normal body, or pieces (lines) of a stream."

    def __init__(self, after: int = 0, reset: bool = False) -> None:
        self.after, self.reset = after, reset

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        normal = work()
        if isinstance(normal.body, bytes):
            headers = {**normal.headers, "Content-Length": str(len(normal.body))}
            wire.send(normal._replace(body=iter([normal.body[: self.after]]), headers=headers))
        else:
            wire.send(normal._replace(body=itertools.islice(normal.body, self.after)), end=False)
        wire.drop(self.reset)

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        message = work()
        call.send_headers()
        call.wire.frame(0, 0, call.stream, call.prefixed(message)[: self.after])
        call.wire.drop(self.reset)


class Trickle(Fault):
    "The normal answer, its head too, a byte at a time."

    def __init__(self, interval: float = 0.05) -> None:
        self.interval = interval

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        wire.trickle = self.interval
        wire.send(work())
        wire.trickle = 0.0

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        call.wire.trickle = self.interval
        call.answer(work())
        call.wire.trickle = 0.0


class Raw(Fault):
    "These bytes instead of an answer, whatever they say; then the connection is closed, or kept."

    def __init__(self, data: bytes, close: bool = True) -> None:
        self.data, self.close = data, close

    def http(self, wire: Connection, work: Callable[[], Any]) -> None:
        wire.write(self.data)
        if self.close:
            wire.drop()

    def grpc(self, call: GRPCCall, work: Callable[[], bytes]) -> None:
        self.http(call.wire, work)


class Split(Fault):
    "The normal body in HTTP chunks of so many bytes, through lines and UTF-8 characters alike."

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        normal = work()
        whole = normal.body if isinstance(normal.body, bytes) else b"".join(normal.body)
        pieces = (whole[at : at + self.size] for at in range(0, len(whole), self.size))
        wire.send(normal._replace(body=pieces))


class Gzip(Fault):
    "The normal body, compressed; each piece of a stream is flushed."

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        normal = work()
        headers = {**normal.headers, "Content-Encoding": "gzip"}
        if isinstance(normal.body, bytes):
            wire.send(normal._replace(body=gzip.compress(normal.body), headers=headers))
            return
        packer, pieces = zlib.compressobj(wbits=31), normal.body
        packed = (packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces)
        tail = (packer.flush() for _ in range(1))
        wire.send(normal._replace(body=itertools.chain(packed, tail), headers=headers))


class NoLength(Fault):
    "The normal body without a length: it ends with the connection, as in HTTP/1.0."

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        normal = work()
        body = iter([normal.body]) if isinstance(normal.body, bytes) else normal.body
        wire.send(normal._replace(body=body, headers={**normal.headers, "Connection": "close"}))
        wire.drop()


class Stream(Fault):
    """A stream of these pieces, one HTTP chunk each: bytes and str as they are, a dict as a line of
    JSON, a number as a pause in seconds. Without `final` the connection is cut in mid-body."""

    def __init__(
        self, pieces: Iterable[Any], final: bool = True, headers: dict[str, str] | None = None
    ) -> None:
        self.pieces, self.final = list(pieces), final
        self.headers = {"Content-Type": "application/json", **(headers or {})}

    def http(self, wire: HTTPConnection, work: Callable[[], Answer]) -> None:
        def body() -> Iterator[bytes]:
            for piece in self.pieces:
                if isinstance(piece, (int, float)):
                    wire.pause(piece)
                elif isinstance(piece, dict):
                    yield json.dumps(piece, ensure_ascii=False).encode() + b"\n"
                else:
                    yield piece.encode() if isinstance(piece, str) else piece

        wire.send(Answer(body(), 200, self.headers), end=self.final)
        if not self.final:
            wire.drop()


class Fail(Fault):
    "The operation that this request starts fails at its end with this gRPC code."

    def __init__(self, code: int = 13, message: str = "Internal error") -> None:
        self.code, self.message = code, message


# --- Stand-in: connections -----------------------------------------------------


class Connection:
    "One TCP connection, served by one thread until either side ends it."

    trickle = 0.0  # seconds between bytes, while a Trickle lasts

    def __init__(self, server: LocalYandexGPT, sock: socket.socket, number: int) -> None:
        self.server, self.sock, self.number = server, sock, number
        self.writing = threading.RLock()

    def write(self, data: bytes) -> None:
        with self.writing:
            for piece in [data] if not self.trickle else (bytes([byte]) for byte in data):
                try:
                    self.sock.sendall(piece)
                except (OSError, ValueError) as error:
                    raise Gone from error
                if self.trickle:
                    self.pause(self.trickle)

    def pause(self, seconds: float | None) -> None:
        "Waits; Gone as soon as the client hangs up or the server closes. None: until release()."
        end = None if seconds is None else time.monotonic() + seconds
        released = self.server.released
        while end is None or time.monotonic() < end:
            if self.server.closing.is_set() or self.hung_up():
                raise Gone
            if end is None and self.server.released != released:
                return
            left = 0.02 if end is None else min(0.02, max(end - time.monotonic(), 0))
            self.server.closing.wait(left)

    def hung_up(self) -> bool:
        try:
            readable = select.select([self.sock], [], [], 0)[0]
            return bool(readable) and not self.sock.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def end(self) -> None:
        "Wakes the thread that reads from this connection; it closes it."
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def drop(self, reset: bool = False) -> None:
        "Ends the connection: politely, or with a TCP reset."
        with contextlib.suppress(OSError):
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.sock.shutdown(socket.SHUT_WR)
        raise Gone


class HTTPConnection(Connection):
    path = "/"

    def serve(self, line: bytes, reader: Any) -> None:
        while line and not self.server.closing.is_set():
            request = self.read_head(line, reader)
            if request is None:
                return
            fault = self.server.record(request)
            self.path = request.path
            if isinstance(fault, Reset) and fault.before:
                self.drop(reset=True)
            pieces = self.read_body(reader, request)
            if request.method != "PUT":  # uploads go to disk, however large they are
                request.body = b"".join(pieces)
                request.size = len(request.body)
                with contextlib.suppress(ValueError, RecursionError):
                    request.json = json.loads(request.body)
            (fault or Fault()).http(self, self.working(request, pieces))
            collections.deque(pieces, maxlen=0)  # what a fault or a refusal left unread
            if request.headers.get("connection", "").lower() == "close":
                return
            line = reader.readline(65536)

    def working(self, request: Recorded, pieces: Iterator[bytes]) -> Callable[[], Answer]:
        def work() -> Answer:
            try:
                return self.server.handle(request, pieces)
            except Refused as refusal:
                return answer(refusal.body(request.path), refusal.status)

        return work

    def read_head(self, line: bytes, reader: Any) -> Recorded | None:
        words = line.decode("latin-1").split()
        if len(words) != 3:
            return None
        headers: dict[str, str] = {}
        for header in iter(lambda: reader.readline(65536), b""):
            if header in (b"\r\n", b"\n"):
                break
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return Recorded(words[0], words[1], headers, self.number, time.monotonic())

    def read_body(self, reader: Any, request: Recorded) -> Iterator[bytes]:
        if request.headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                size = int(reader.readline(1024).split(b";")[0] or b"0", 16)
                if size:
                    yield self.exactly(reader, size)
                reader.readline(1024)
                if not size:
                    return
        left = int(request.headers.get("content-length", "0"))
        while left > 0:
            piece = self.exactly(reader, min(left, 1 << 16))
            left -= len(piece)
            yield piece

    def exactly(self, reader: Any, size: int) -> bytes:
        data: bytes = reader.read(size)
        if len(data) < size:
            raise Gone
        return data

    def send(self, reply: Answer, end: bool = True) -> None:
        """Whole bodies with their length; iterators chunk by chunk, unless the headers say how the
        body ends. The head goes out with the first piece."""
        headers = {
            "x-request-id": str(uuid.uuid4()), "x-server-trace-id": uuid.uuid4().hex,
            "Server": "LocalYandexGPT", **reply.headers,
        }
        pieces: Iterator[bytes]
        if isinstance(reply.body, bytes):
            headers.setdefault("Content-Length", str(len(reply.body)))
            pieces, chunked = iter([reply.body]), False
        else:
            pieces = reply.body
            chunked = "Content-Length" not in headers and headers.get("Connection") != "close"
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
        head = f"HTTP/1.1 {reply.status} {REASON.get(reply.status, 'Unknown')}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        pending = head.encode("latin-1")
        for place, piece in enumerate(pieces):
            if chunked and place and self.server.delay:
                self.pause(self.server.delay)
            if chunked and piece:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            self.write(pending + piece)
            pending = b""
        if chunked and end:
            pending += b"0\r\n\r\n"
        if pending:
            self.write(pending)


class GRPCConnection(Connection):
    "HTTP/2 with prior knowledge: unary gRPC calls, a thread for each stream."

    def serve(self, line: bytes, reader: Any) -> None:
        if reader.read(8) != b"\r\nSM\r\n\r\n":
            return
        self.decoder = HeaderDecoder()
        self.calls: dict[int, GRPCCall] = {}
        self.window, self.initial_window = 65535, 65535  # what the peer still takes
        self.opened = threading.Condition()
        self.block: tuple[int, int, bytes] | None = None  # stream, flags, header block so far
        self.frame(4, 0, 0, struct.pack(">HI", 4, 1 << 20))
        self.frame(8, 0, 0, struct.pack(">I", 1 << 20))
        while True:
            head = reader.read(9)
            if len(head) < 9:
                return
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            if size > 1 << 14:
                self.frame(7, 0, 0, struct.pack(">II", 0, 6))  # FRAME_SIZE_ERROR
                return
            payload = reader.read(size)
            if len(payload) < size:
                return
            stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
            if kind in self.ON_FRAME:
                self.ON_FRAME[kind](self, flags, stream, payload)

    def frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.write(struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload)

    def on_data(self, flags: int, stream: int, payload: bytes) -> None:
        call = self.calls.get(stream)
        if payload:
            for number in (0, stream):
                self.frame(8, 0, number, struct.pack(">I", len(payload)))
        if call is not None:
            call.body += payload[1 : len(payload) - payload[0]] if flags & 8 else payload
            if flags & 1:
                call.start()

    def on_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & 8:  # padded
            payload = payload[1 : len(payload) - payload[0]]
        if flags & 0x20:  # a priority, of no interest here
            payload = payload[5:]
        self.block = (stream, flags, payload)
        if flags & 4:
            self.end_headers()

    def on_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        if self.block is None or self.block[0] != stream:
            raise Gone
        self.block = (stream, self.block[1], self.block[2] + payload)
        if flags & 4:
            self.end_headers()

    def end_headers(self) -> None:
        assert self.block is not None
        stream, flags, block = self.block
        self.block = None
        try:
            headers = dict(self.decoder.decode(block))
        except (ValueError, IndexError):
            self.frame(7, 0, 0, struct.pack(">II", 0, 9))  # COMPRESSION_ERROR
            self.drop()
        call = self.calls[stream] = GRPCCall(self, stream, headers)
        if flags & 1:
            call.start()

    def on_reset(self, flags: int, stream: int, payload: bytes) -> None:
        self.calls.pop(stream, None)
        with self.opened:
            self.opened.notify_all()

    def on_settings(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & 1:
            return
        with self.opened:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    for call in self.calls.values():
                        call.window += value - self.initial_window
                    self.initial_window = value
            self.opened.notify_all()
        self.frame(4, 1, 0, b"")

    def on_ping(self, flags: int, stream: int, payload: bytes) -> None:
        if not flags & 1:
            self.frame(6, 1, 0, payload)

    def on_window(self, flags: int, stream: int, payload: bytes) -> None:
        with self.opened:
            (size,) = struct.unpack(">I", payload)
            if stream == 0:
                self.window += size
            elif stream in self.calls:
                self.calls[stream].window += size
            self.opened.notify_all()

    ON_FRAME: ClassVar[dict[int, Callable[[Any, int, int, bytes], None]]] = {
        0: on_data, 1: on_headers, 3: on_reset, 4: on_settings, 6: on_ping, 8: on_window,
        9: on_continuation,
    }


class GRPCCall:
    "One stream: a request message in, an answer message and a status out."

    def __init__(self, wire: GRPCConnection, stream: int, headers: dict[str, str]) -> None:
        self.wire, self.stream, self.headers = wire, stream, headers
        self.window, self.body = wire.initial_window, b""
        self.at = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        path = self.headers.get(":path", "")
        method, number = self.headers.get(":method", ""), self.wire.number
        request = Recorded(method, path, self.headers, number, self.at, self.body[5:])
        request.size = len(self.body)
        fault = self.wire.server.record(request)
        try:
            if isinstance(fault, Reset) and fault.before and fault.code is None:
                self.wire.drop(reset=True)
            work = self.wire.server.rpc(request, self.body)
            (fault or Fault()).grpc(self, work)
        except Refused as refusal:
            with contextlib.suppress(Gone):
                self.refuse(refusal)
        except Gone:
            self.wire.end()

    def prefixed(self, message: bytes) -> bytes:
        return b"\0" + struct.pack(">I", len(message)) + message

    def send_headers(self, *more: tuple[str, str], end: bool = False) -> None:
        usual = [(":status", "200"), ("content-type", "application/grpc"),
                 ("x-request-id", str(uuid.uuid4())), ("x-server-trace-id", uuid.uuid4().hex)]
        self.wire.frame(1, 5 if end else 4, self.stream, encode_headers([*usual, *more]))

    def answer(self, message: bytes) -> None:
        self.send_headers()
        data = self.prefixed(message)
        while data:
            size = self.wait_for_window(min(len(data), 1 << 14))
            self.wire.frame(0, 0, self.stream, data[:size])
            data = data[size:]
        self.wire.frame(1, 5, self.stream, encode_headers([("grpc-status", "0")]))
        self.wire.calls.pop(self.stream, None)

    def wait_for_window(self, size: int) -> int:
        "Takes up to so many bytes of both windows, once they are open."
        wire = self.wire
        with wire.opened:
            while min(wire.window, self.window) <= 0:
                if wire.server.closing.is_set() or self.stream not in wire.calls or wire.hung_up():
                    raise Gone
                wire.opened.wait(0.05)
            size = min(size, wire.window, self.window)
            wire.window -= size
            self.window -= size
        return size

    def refuse(self, refusal: Refused, headers: dict[str, str] | None = None) -> None:
        "Trailers only, the message percent-encoded."
        message = urllib.parse.quote(refusal.message, safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}")
        trailers = {"grpc-status": str(refusal.code), "grpc-message": message, **(headers or {})}
        self.send_headers(*trailers.items(), end=True)
        self.wire.calls.pop(self.stream, None)


# --- Stand-in: the service -----------------------------------------------------

MODELS = {
    "yandexgpt", "yandexgpt-lite", "yandexgpt-5-lite", "yandexgpt-5-pro", "yandexgpt-5.1",
    "yandexgpt-32k", "llama", "llama-lite", "aliceai-llm", "qwen3-235b-a22b-fp8", "gpt-oss-120b",
    "gpt-oss-20b", "gemma-3-27b-it",
}
VERSIONS = {"latest", "rc", "deprecated", "previous"}
DONE = {"COMPLETED", "FAILED", "CANCELED"}
USER = "ajelocal"  # who created everything here
NAME = re.compile(r"[\w-]{1,64}")  # of a function or a schema
TUNING = "ai.tuning.v1.TuningService"
DATASET = "ai.dataset.v1.DatasetService"
BATCH = "ai.batch_inference.v1.BatchInferenceService"
CHAT_FIELDS: dict[str, tuple[type, ...]] = {  # the top level of a chat request
    "model": (str,), "messages": (list,), "stream": (bool,), "stream_options": (dict,),
    "temperature": (int, float), "top_p": (int, float), "max_tokens": (int,), "n": (int,),
    "max_completion_tokens": (int,), "stop": (str, list), "seed": (int,), "user": (str,),
    "presence_penalty": (int, float), "frequency_penalty": (int, float), "logit_bias": (dict,),
    "logprobs": (bool,), "top_logprobs": (int,), "tools": (list,), "tool_choice": (str, dict),
    "parallel_tool_calls": (bool,), "response_format": (dict,), "reasoning_effort": (str,),
    "metadata": (dict,), "store": (bool,), "service_tier": (str,), "verbosity": (str,),
    "modalities": (list,), "prediction": (dict,), "top_k": (int,), "min_p": (int, float),
    "repetition_penalty": (int, float), "chat_template_kwargs": (dict,), "safety_identifier": (str,),
    "prompt_cache_key": (str,),
}


def now(after: float = 0.0) -> str:
    moment = datetime.now(timezone.utc) + timedelta(seconds=after)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:17]


def public(state: JSON) -> JSON:
    "What the service shows of a record: names with an underscore are the stand-in's own."
    return {key: value for key, value in state.items() if not key.startswith("_")}


def token_usage(prompt: int, completion: int, reasoning: int) -> JSON:
    counts = {"inputTextTokens": prompt, "completionTokens": completion,
              "totalTokens": prompt + completion}
    shown: JSON = {name: str(count) for name, count in counts.items()}
    return {**shown, "completionTokensDetails": {"reasoningTokens": str(reasoning)}}


def truncate(text: str, limit: int | None) -> tuple[str, bool]:
    "At most so many tokens of a text, and whether any were cut off."
    if limit is None or count_tokens(text) <= limit:
        return text, False
    return "".join(tokens(text)[:limit]), True


def packed_any(name: str, **fields: Any) -> JSON:
    return {"@type": TYPE_URL + name, **fields}


def whole(schema: Any) -> Any:
    "A schema that went through a Struct with its whole numbers as int again."
    return json.loads(json.dumps(schema), parse_float=lambda text: (
        int(float(text)) if float(text).is_integer() else float(text)))


def move(task: JSON, status: str) -> None:
    "A tuning or batch task into another status."
    task["status"] = status
    if status == "IN_PROGRESS":
        task.setdefault("startedAt", now())
    if status in DONE:
        task["finishedAt"] = now()


def s3_error(status: int, code: str, message: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(body.encode(), status, {"Content-Type": "application/xml"})


class LocalYandexGPT:
    """The service's text API on this machine: `with LocalYandexGPT() as server: server.url`.

    delay: seconds between the chunks of a stream. parquet: datasets are stored and served as
    Parquet (needs pyarrow). discard: uploads are counted, not kept.
    Its state (`operations`, `datasets`, `tunings`, `batches`) may be read and changed by tests."""

    def __init__(
        self, port: int = 0, *, delay: float = 0.0, parquet: bool = False, discard: bool = False
    ) -> None:
        self.port, self.delay, self.parquet, self.discard = port, delay, parquet, discard
        self.requests: list[Recorded] = []
        self.polls = 2  # how many polls an operation is still running
        self.keys: set[str] | None = None  # accepted API keys and tokens; None: any
        self.folder: str | None = None  # the only folder that models may be asked in; None: any
        self.min_part = 5 << 20  # bytes of every part of a multipart upload but the last
        self.answer: Callable[[JSON], str | JSON | None] | None = None  # instead of think()
        self.operations: dict[str, JSON] = {}
        self.datasets: dict[str, JSON] = {}
        self.tunings: dict[str, JSON] = {}
        self.batches: dict[str, JSON] = {}
        self.iam_tokens: dict[str, str] = {}  # each token issued: by "oauth" or "metadata"
        self.expired: set[str] = set()
        self.open_connections = 0
        self.connections = 0  # accepted so far
        self.released = 0  # how often release() was called
        self.closing = threading.Event()
        self.changed = threading.Condition(threading.RLock())
        self._faults: list[tuple[str | None, Fault]] = []
        self._started: dict[tuple[str, str], Callable[[], JSON]] = {}  # by Idempotency-Key
        self._drafts: dict[str, JSON] = {}  # pre-signed uploads by their key
        self._files: dict[str, pathlib.Path] = {}  # pre-signed downloads by their key
        self._live: dict[int, Connection] = {}
        self._threads: list[threading.Thread] = []
        self._folder = pathlib.Path()

    # Life

    def start(self) -> LocalYandexGPT:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="local-yandex-gpt-"))
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = self._listener.getsockname()[1]
        thread = threading.Thread(target=self._accept, daemon=True)
        self._threads.append(thread)
        thread.start()
        return self

    def close(self) -> None:
        "Ends every connection and stall, and forgets the uploads."
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self.changed:
            live = list(self._live.values())
        for connection in live:
            connection.end()
        for thread in self._threads:
            thread.join(2)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalYandexGPT:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            with self.changed:
                self.connections += 1
                self.open_connections += 1
                number = self.connections
                self.changed.notify_all()
            thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = sock.makefile("rb", 1 << 16)
        try:
            line = reader.readline(65536)
            kind = GRPCConnection if line == b"PRI * HTTP/2.0\r\n" else HTTPConnection
            connection = kind(self, sock, number)
            with self.changed:
                self._live[number] = connection
            if not self.closing.is_set():
                connection.serve(line, reader)
        except (Gone, OSError, ValueError):
            pass  # the peer left, or speaks no protocol known here
        finally:
            reader.close()
            sock.close()
            with self.changed:
                self._live.pop(number, None)
                self.open_connections -= 1
                self.changed.notify_all()

    # What tests use

    def next(self, *faults: Fault, path: str | None = None) -> None:
        "Queues faults, one for each coming request (whose path contains `path`)."
        with self.changed:
            self._faults += [(path, fault) for fault in faults]

    @property
    def unused(self) -> list[Fault]:
        return [fault for _, fault in self._faults]

    def release(self) -> None:
        "Ends the stalls that have no length of their own."
        self.released += 1

    def wait_for(self, condition: Callable[[LocalYandexGPT], object], timeout: float = 5.0) -> bool:
        end = time.monotonic() + timeout
        with self.changed:
            while not condition(self):
                if time.monotonic() >= end:
                    return False
                self.changed.wait(0.05)
        return True

    def expire_tokens(self) -> None:
        "Every IAM token issued so far is refused from now on."
        self.expired.update(self.iam_tokens)

    def forget(self, operation_id: str) -> None:
        "As the service does after some days: the operation is not found any more."
        del self.operations[operation_id]

    def issued(self, origin: str) -> int:
        "How many tokens were handed out by `oauth` or `metadata`."
        return list(self.iam_tokens.values()).count(origin)

    def record(self, request: Recorded) -> Fault | None:
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
            for place, (path, fault) in enumerate(self._faults):
                if path is None or path in request.path:
                    del self._faults[place]
                    request.fault = fault
                    return fault
        return None

    # Requests: routes, credentials, creation

    def handle(self, request: Recorded, pieces: Iterator[bytes]) -> Answer:
        "The answer of the REST handler for this path."
        path = urllib.parse.urlsplit(request.path).path
        found = {method: (handler, match) for (method, pattern), handler in self.ROUTES.items()
                 for match in [re.fullmatch(pattern, path)] if match}
        if not found:
            raise Refused(5, f"Not found: {path}")
        if request.method not in found:
            raise Refused(12, f"Method Not Allowed: {request.method} {path}", 405)
        handler, match = found[request.method]
        if request.method == "PUT":
            return self.upload(request, match[1], pieces)
        if handler not in self.PUBLIC:
            self.authorize(request)
        if request.method == "POST" and not isinstance(request.json, dict):
            raise Refused(3, "proto: syntax error (line 1:1): the body is not a JSON object")
        value = handler(self, request, *match.groups())
        return value if isinstance(value, Answer) else answer(value)

    def rpc(self, request: Recorded, body: bytes) -> Callable[[], bytes]:
        "Decodes a gRPC request; the work it asks for is done when the result is called."
        require(request.path in self.METHODS, f"unknown method {request.path}", 12)
        takes, gives, handler = self.METHODS[request.path]
        require(request.headers.get("content-type", "").startswith("application/grpc"),
                "invalid gRPC request content-type", 2)
        require(len(body) >= 5 and int.from_bytes(body[1:5], "big") == len(body) - 5,
                "the request is not one whole message", 13)
        require(body[0] == 0, "grpc: Decompressor is not installed", 12)
        try:
            request.json = decode(takes, request.body)
        except (ValueError, KeyError, struct.error, TypeError, AttributeError) as error:
            raise Refused(13, f"failed to unmarshal the received message: {error}") from error

        def work() -> bytes:
            self.authorize(request)
            return encode(gives, handler(self, request, copy.deepcopy(request.json)))

        return work

    def authorize(self, request: Recorded) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        require(scheme in ("Api-Key", "Bearer") and key.strip(),
                "The authorization header is missing or malformed: Api-Key or Bearer expected", 16)
        require(key not in self.expired, "The token is invalid or has expired", 16)
        if self.keys is not None and key not in self.keys and key not in self.iam_tokens:
            raise Refused(16, "The token is invalid" if scheme == "Bearer" else "Unknown api key")
        if scheme == "Bearer" and request.path.startswith("/foundationModels/"):
            require(request.headers.get("x-folder-id"), "folder ID is not specified: x-folder-id "
                    "header is required with an IAM token")

    def once(self, request: Recorded, make: Callable[[], Callable[[], JSON]]) -> JSON:
        "Makes something, or shows again what this Idempotency-Key has made before."
        key = request.headers.get("idempotency-key")
        with self.changed:
            if key is None:
                return make()()
            if (request.path, key) not in self._started:
                self._started[request.path, key] = make()
            return self._started[request.path, key]()

    # Text generation

    def check_model(self, uri: Any) -> None:
        match = re.fullmatch(r"gpt://([A-Za-z0-9_.-]+)/([^/]+)(?:/([^/]+))?", str(uri))
        if match is None:
            raise Refused(3, f"Failed to parse model URI: {uri!r}, gpt://<folder>/<model> expected")
        folder, name, version = match.groups()
        require(self.folder in (None, folder), f"Specified folder ID '{folder}' does not match "
                f"with service account folder ID '{self.folder}'")
        tuned = any(task.get("targetModelUri") == uri for task in self.tunings.values())
        known = name in MODELS and (version or "latest") in VERSIONS
        require(known or tuned, f"Failed to get model '{uri}'", 5)

    def completion_request(self, request: Recorded) -> JSON:
        "The body as the service understands it: defaults gone, 64-bit numbers as strings."
        body = decode("CompletionRequest", encode("CompletionRequest", request.json))
        require(body.get("modelUri"), "model_uri: is required")
        self.check_model(body["modelUri"])
        options = body.get("completionOptions", {})
        require(0 <= options.get("temperature", 0.0) <= 1, "temperature must be in [0, 1]")
        require(int(options.get("maxTokens", 1)) > 0, "max_tokens must be greater than 0")
        require(body.get("messages"), "messages: must not be empty")
        for place, message in enumerate(body["messages"]):
            require(message.get("role") in ("system", "user", "assistant"),
                    f"messages[{place}].role: must be system, user or assistant")
            require(message.keys() & {"text", "toolCallList", "toolResultList"},
                    f"messages[{place}]: content is not set")
        for tool in body.get("tools", []):
            require(NAME.fullmatch(tool.get("function", {}).get("name", "")),
                    "tools: function name must match [a-zA-Z0-9_-]{1,64}")
        return body

    def complete(self, raw: JSON, body: JSON) -> tuple[JSON, str, int]:
        "The model's message, its status and the number of prompt tokens."
        results = [result["functionResult"] for result in
                   body["messages"][-1].get("toolResultList", {}).get("toolResults", [])]
        choice = body.get("toolChoice", {})
        prompt = Prompt(
            texts=[message["text"] for message in body["messages"]
                   if message["role"] == "user" and "text" in message],
            results=[result.get("content", "") for result in results],
            tools=whole([tool["function"] for tool in body.get("tools", [])]),
            choice=choice.get("functionName") or choice.get("mode", "AUTO"),
            parallel=body.get("parallelToolCalls", True),
            schema=whole(body["jsonSchema"].get("schema", {})) if "jsonSchema" in body else
            {} if body.get("jsonObject") else None,
        )
        thought: Any = self.answer(raw) if self.answer else None
        count = sum(special or count_tokens(text) for text, special in self.template(body))
        if thought is None:
            thought = think(prompt)
        if isinstance(thought, dict):
            message = {"role": "assistant", **thought}
            called = "toolCallList" in message
            return message, "TOOL_CALLS" if called else "FINAL", count
        if isinstance(thought, list):
            calls = [{"functionCall": dict(zip(("name", "arguments"), call))} for call in thought]
            message = {"role": "assistant", "toolCallList": {"toolCalls": calls}}
            # through protobuf and back: a Struct has only doubles
            return decode("Message", encode("Message", message)), "TOOL_CALLS", count
        limit = body.get("completionOptions", {}).get("maxTokens")
        text, cut = truncate(thought, limit and int(limit))
        return {"role": "assistant", "text": text}, "TRUNCATED_FINAL" if cut else "FINAL", count

    def result(self, message: JSON, status: str, prompt_tokens: int, body: JSON) -> JSON:
        text = message.get("text") or json.dumps(message.get("toolCallList", ""))
        mode = body.get("completionOptions", {}).get("reasoningOptions", {}).get("mode")
        reasoning = 16 if mode == "ENABLED_HIDDEN" else 0
        return {
            "alternatives": [{"message": message, "status": f"ALTERNATIVE_STATUS_{status}"}],
            "usage": token_usage(prompt_tokens, count_tokens(text) + reasoning, reasoning),
            "modelVersion": "25.01.2025",
        }

    def completion(self, request: Recorded) -> JSON | Answer:
        body = self.completion_request(request)
        message, status, count = self.complete(request.json, body)
        last = {"result": self.result(message, status, count, body)}
        if not body.get("completionOptions", {}).get("stream"):
            return last
        pieces = tokens(message.get("text", ""))
        step = max(1, len(pieces) // 50)

        def lines() -> Iterator[bytes]:
            for end in range(step, len(pieces), step):
                part = {**message, "text": "".join(pieces[:end])}
                line = {"result": self.result(part, "PARTIAL", count, body)}
                yield json.dumps(line, ensure_ascii=False).encode() + b"\n"
            yield json.dumps(last, ensure_ascii=False).encode() + b"\n"

        return Answer(lines())

    def completion_async(self, request: Recorded) -> JSON:
        body = self.completion_request(request)
        require(not body.get("completionOptions", {}).get("stream"),
                "stream is not supported in asynchronous mode")

        def result() -> JSON:
            response = self.result(*self.complete(request.json, body), body)
            return packed_any("foundation_models.v1.CompletionResponse", **response)

        return self.once(request, lambda: self.begin(request, "Async GPT Completion", result))

    def template(self, body: JSON) -> list[tuple[str, bool]]:
        "What a conversation is billed as: its texts, and (True) the chat template's own tokens."
        out = [("<s>", True)]
        for message in body["messages"]:
            text = message.get("text")
            if text is None:
                text = json.dumps({key: value for key, value in message.items() if key != "role"})
            out += [(f"<{message['role']}>", True), (text, False)]
        out += [(json.dumps(tool), False) for tool in body.get("tools", [])]
        return [*out, ("<assistant>", True)]

    def token_list(self, parts: list[tuple[str, bool]]) -> JSON:
        pieces = [(piece, special) for text, special in parts
                  for piece in ([text] if special else tokens(text))]
        found = [{"id": str(zlib.crc32(piece.encode()) % 128000), "text": piece.replace(" ", "▁"),
                  "special": special} for piece, special in pieces]
        return {"tokens": found, "modelVersion": "25.01.2025"}

    def tokenize_completion(self, request: Recorded) -> JSON:
        return self.token_list(self.template(self.completion_request(request)))

    def tokenize(self, request: Recorded) -> JSON:
        body = decode("TokenizeRequest", encode("TokenizeRequest", request.json))
        self.check_model(body.get("modelUri", ""))
        return self.token_list([("<s>", True), (body.get("text", ""), False)])

    # Operations

    def begin(
        self,
        request: Recorded,
        description: str,
        result: Callable[[], JSON],
        stage: Callable[[str, float], JSON | None] = lambda status, fraction: None,
    ) -> Callable[[], JSON]:
        """Starts an operation that runs for `polls` polls. `stage` is told its status and progress
        (0..1) and gives its metadata; `result` is asked for its response once, at the end."""
        operation: JSON = {
            "id": new_id("fbv"), "description": description, "createdAt": now(),
            "createdBy": USER, "modifiedAt": now(), "done": False, "metadata": None,
            "_left": self.polls, "_all": self.polls, "_result": result, "_stage": stage,
            "_fail": request.fault if isinstance(request.fault, Fail) else None,
        }
        operation["metadata"] = stage("CREATED", 0.0)
        self.operations[operation["id"]] = operation
        return lambda: public(operation)

    def begin_task(
        self,
        request: Recorded,
        description: str,
        task: JSON,
        result: Callable[[], JSON],
        stage: Callable[[str, float], JSON | None],
    ) -> Callable[[], JSON]:
        "An operation with a task that can be asked for by an id of its own."
        shown = self.begin(request, description, result, stage)
        task["operationId"] = shown()["id"]
        task["_operation"] = self.operations[task["operationId"]]
        return shown

    def poll(self, operation: JSON) -> JSON:
        "One more look at an operation, which takes it a step further."
        with self.changed:
            if operation["done"]:
                return public(operation)
            operation["modifiedAt"] = now()
            if operation["_left"] > 0:
                operation["_left"] -= 1
                status = {0: "IN_PROGRESS", 1: "PENDING"}.get(operation["_left"], "CREATED")
                fraction = (operation["_all"] - operation["_left"]) / (operation["_all"] + 1)
                operation["metadata"] = operation["_stage"](status, fraction)
                return public(operation)
            failure, response = operation["_fail"], None
            if failure is None:
                try:
                    response = operation["_result"]()
                except Refused as refusal:
                    failure = refusal
            if failure:
                self.finish(operation, "FAILED", failure.code, failure.message)
            else:
                operation.update(done=True, response=response)
                operation["metadata"] = operation["_stage"]("COMPLETED", 1.0)
        return public(operation)

    def finish(self, operation: JSON, status: str, code: int, message: str) -> None:
        error = {"code": code, "message": message, "details": []}
        operation.update(done=True, error=error, modifiedAt=now())
        operation["metadata"] = operation["_stage"](status, 0.0)

    def cancel(self, operation: JSON) -> JSON:
        with self.changed:
            if not operation["done"]:
                self.finish(operation, "CANCELED", 1, "The operation was cancelled")
        return public(operation)

    def find(self, table: dict[str, JSON], key: str | None, what: str) -> JSON:
        if not key or key not in table:
            raise Refused(5, f"{what} with id {key} not found")
        return table[key]

    def get_operation(self, request: Recorded, operation_id: str) -> JSON:
        return self.poll(self.find(self.operations, operation_id, "Operation"))

    def cancel_operation(self, request: Recorded, operation_id: str) -> JSON:
        operation = self.find(self.operations, operation_id, "Operation")
        return self.cancel(operation)

    # Credentials

    def issue(self, origin: str) -> str:
        with self.changed:
            token = f"t1.local-{origin}-{len(self.iam_tokens) + 1}"
            self.iam_tokens[token] = origin
        return token

    def exchange_token(self, request: Recorded) -> JSON:
        unknown = set(request.json) - {"yandexPassportOauthToken", "jwt"}
        require(not unknown, f'proto: (line 1:2): unknown field "{"".join(sorted(unknown)[:1])}"')
        token = str(request.json.get("yandexPassportOauthToken"))
        require(re.fullmatch(r"y[0-3]_\S+", token), "OAuth token is invalid or expired", 16)
        return {"iamToken": self.issue("oauth"), "expiresAt": now(12 * 3600)}

    def metadata_token(self, request: Recorded) -> JSON | Answer:
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(b"Metadata-Flavor is required", 403, {"Content-Type": "text/plain"})
        return {"access_token": self.issue("metadata"), "expires_in": 43200, "token_type": "Bearer"}

    # The OpenAI-compatible API

    def chat_request(self, body: JSON) -> None:
        "Refuses what the API does not know."
        for name, value in body.items():
            require(name in CHAT_FIELDS, f"Unrecognized request argument supplied: {name}")
            fits = isinstance(value, CHAT_FIELDS[name]) and (
                not isinstance(value, bool) or bool in CHAT_FIELDS[name])
            require(fits or value is None, f"Invalid type for '{name}': {json.dumps(value)[:80]}")
        require(body.get("model"), "you must provide a model parameter")
        self.check_model(body["model"])
        require(body.get("messages"), "'messages' must be a non-empty array")
        require(0 <= (body.get("temperature") or 0) <= 2, "temperature must be between 0 and 2")
        require((body.get("n") or 1) == 1, "n must be 1")
        for name in ("max_tokens", "max_completion_tokens"):
            require((body.get(name) or 1) > 0, f"{name} must be greater than 0")
        effort = body.get("reasoning_effort") or "none"
        require(effort in ("none", "minimal", "low", "medium", "high"),
                f"Invalid value: '{effort}'. Supported values are: 'low', 'medium', and 'high'.")
        shape = body.get("response_format") or {"type": "text"}
        require(shape.get("type") in ("text", "json_object", "json_schema"),
                "Invalid value: 'response_format.type'")
        if shape["type"] == "json_schema":
            inner: Any = shape.get("json_schema")
            require(isinstance(inner, dict) and NAME.fullmatch(str(inner.get("name", ""))),
                    "Missing required parameter: 'response_format.json_schema.name'.")
            require(isinstance(inner.get("schema", {}), dict),
                    "Invalid type for 'response_format.json_schema.schema'")
            require(not set(inner) - {"name", "schema", "strict", "description"},
                    "unknown parameter in response_format.json_schema")
        for tool in body.get("tools") or []:
            function = tool.get("function") if isinstance(tool, dict) else None
            require(isinstance(function, dict) and tool.get("type") == "function"
                    and NAME.fullmatch(str(function.get("name", "")))
                    and not set(function) - {"name", "description", "parameters", "strict"},
                    f"Invalid value in 'tools': {json.dumps(tool)[:200]}")
        self.chat_messages(body["messages"])

    def chat_messages(self, messages: list[Any]) -> None:
        calls: set[str] = set()
        for place, message in enumerate(messages):
            where = f"messages[{place}]"
            require(isinstance(message, dict), f"Invalid type for '{where}'")
            role = message.get("role")
            allowed = {"role", "content", "name"}
            if role == "assistant":
                allowed |= {"tool_calls", "refusal", "reasoning_content", "audio", "function_call"}
            if role == "tool":
                allowed.add("tool_call_id")
            require(role in ("system", "developer", "user", "assistant", "tool"),
                    f"Invalid value for '{where}.role': {role!r}")
            unknown = sorted(set(message) - allowed)
            require(not unknown, f"Unrecognized request arguments in {where}: {unknown}")
            for call in message.get("tool_calls") or []:
                function = call.get("function") if isinstance(call, dict) else None
                require(isinstance(function, dict) and call.get("type") == "function"
                        and call.get("id") and isinstance(function.get("name"), str)
                        and isinstance(function.get("arguments"), str),
                        f"Invalid value in '{where}.tool_calls'")
                calls.add(call["id"])
            if role == "tool":
                require(message.get("tool_call_id") in calls,
                        f"'{where}.tool_call_id' answers no preceding tool call")
            content = message.get("content")
            require(isinstance(content, (str, list)) or message.get("tool_calls"),
                    f"Invalid type for '{where}.content': a string or an array of parts expected")
            for part in content if isinstance(content, list) else []:
                self.chat_part(part, where)

    def chat_part(self, part: Any, where: str) -> None:
        kind = part.get("type") if isinstance(part, dict) else None
        require(kind in ("text", "image_url"), f"Invalid part in '{where}': {str(part)[:80]}")
        if kind == "text":
            require(isinstance(part.get("text"), str), f"Invalid text in '{where}'")
            return
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else None
        require(isinstance(url, str), f"Invalid image_url in '{where}'")
        match = re.match(r"data:image/(png|jpeg|gif|webp|bmp);base64,(?=.)", str(url))
        require(match or re.match(r"https?://", str(url)), f"Invalid image URL in '{where}'")
        if match:
            try:
                base64.b64decode(str(url)[match.end() :], validate=True)
            except binascii.Error as error:
                raise Refused(3, f"Invalid base64 image in '{where}': {error}") from error

    def chat_prompt(self, body: JSON) -> Prompt:
        def text(message: JSON) -> str:
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            images = sum(part["type"] == "image_url" for part in content)
            words = " ".join(part["text"] for part in content if part["type"] == "text")
            return words + (f" [images: {images}]" if images else "")

        messages = body["messages"]
        trailing = itertools.takewhile(lambda last: last["role"] == "tool", reversed(messages))
        choice = body.get("tool_choice") or "auto"
        if isinstance(choice, dict):
            choice = choice.get("function", {}).get("name", "")
        else:
            require(choice in ("none", "auto", "required"), f"Invalid 'tool_choice': {choice}")
            choice = choice.upper()
        shape = body.get("response_format") or {"type": "text"}
        named = shape.get("json_schema", {}).get("schema", {})
        schemas: dict[str, JSON] = {"json_object": {}, "json_schema": named}
        return Prompt(
            texts=[text(message) for message in messages if message["role"] == "user"],
            results=[text(message) for message in trailing][::-1],
            tools=[tool["function"] for tool in body.get("tools") or []],
            choice=choice,
            parallel=body.get("parallel_tool_calls") is not False,
            schema=schemas.get(shape["type"]),
        )

    def chat(self, request: Recorded) -> JSON | Answer:
        body = request.json
        self.chat_request(body)
        prompt = self.chat_prompt(body)
        thought: Any = self.answer(body) if self.answer else None
        if thought is None:
            thought = think(prompt)
        message: JSON = {"role": "assistant", "content": None}
        effort = body.get("reasoning_effort") or "none"
        if effort != "none":
            message["reasoning_content"] = f"The user asks: {(prompt.texts or [''])[-1]}"
        reason = "stop"
        if isinstance(thought, dict):
            message.update(thought)
            reason = "tool_calls" if message.get("tool_calls") else "stop"
        elif isinstance(thought, list):
            reason = "tool_calls"
            message["tool_calls"] = [
                {"id": new_id("call_"), "type": "function",
                 "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
                for name, arguments in thought
            ]
        else:
            stops = body.get("stop") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                thought = thought.partition(stop)[0]
            limit = body.get("max_tokens") or body.get("max_completion_tokens")
            message["content"], cut = truncate(thought, limit)
            reason = "length" if cut else "stop"
        spent = count_tokens(json.dumps(body["messages"], ensure_ascii=False))
        reasoning = count_tokens(message.get("reasoning_content") or "")
        said = count_tokens(message.get("content") or json.dumps(message.get("tool_calls")))
        usage = {"prompt_tokens": spent, "completion_tokens": said + reasoning,
                 "total_tokens": spent + said + reasoning,
                 "completion_tokens_details": {"reasoning_tokens": reasoning}}
        head = {"id": new_id("chatcmpl-"), "object": "chat.completion", "created": int(time.time()),
                "model": body["model"]}
        if body.get("stream"):
            head["object"] += ".chunk"
            last = (body.get("stream_options") or {}).get("include_usage") is not False
            events = self.chat_events(head, message, reason, usage if last else None)
            return Answer(events, 200, {"Content-Type": "text/event-stream; charset=utf-8"})
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**head, "choices": [choice], "usage": usage}

    def chat_events(
        self, head: JSON, message: JSON, reason: str, usage: JSON | None
    ) -> Iterator[bytes]:
        "As the real models stream: a role alone, an empty delta, then piece by piece."

        def event(delta: JSON, finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return sse({**head, "choices": [choice]})

        def sse(value: JSON) -> bytes:
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

        yield event({"role": "assistant", "content": ""})
        yield event({})
        for name in ("reasoning_content", "content"):
            for piece in tokens(message.get(name) or ""):
                yield event({name: piece})
        for index, call in enumerate(message.get("tool_calls") or []):
            function = {"name": call["function"]["name"], "arguments": ""}
            yield event({"tool_calls": [{**call, "index": index, "function": function}]})
            for piece in re.findall(r".{1,7}", call["function"]["arguments"], re.S):
                later = {"index": index, "id": "", "type": "function"}
                yield event({"tool_calls": [{**later, "function": {"arguments": piece}}]})
        yield event({}, reason)
        if usage is not None:
            yield sse({**head, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def models(self, request: Recorded) -> JSON:
        folder = request.headers.get("openai-project") or request.headers.get("x-folder-id")
        folder = self.folder or folder or "b1glocal"
        ids = [f"gpt://{folder}/{name}/latest" for name in sorted(MODELS)]
        ids += [task["targetModelUri"] for task in self.tunings.values() if "targetModelUri" in task]
        ids.append(f"emb://{folder}/text-search-doc/latest")
        data = [{"id": each, "object": "model", "created": 0, "owned_by": "yandex"} for each in ids]
        return {"object": "list", "data": data}

    # Datasets

    def create_dataset(self, request: Recorded, body: JSON) -> JSON:
        require(body.get("folderId"), "folder_id: is required")
        require(body.get("taskType"), "task_type: is required")
        require(body.get("uploadFormat", "jsonlines") == "jsonlines", "upload_format: is unknown")

        def make() -> Callable[[], JSON]:
            dataset = self.new_dataset(body)
            return lambda: {"datasetId": dataset["datasetId"], "dataset": public(dataset)}

        return self.once(request, make)

    def new_dataset(self, fields: JSON) -> JSON:
        known = {key: value for key, value in fields.items() if key != "uploadFormat"}
        dataset: JSON = {
            "datasetId": new_id("fds"), **known, "status": "DRAFT", "createdAt": now(), "rows": "0",
            "updatedAt": now(), "sizeBytes": "0", "createdBy": USER, "createdById": USER,
        }
        self.datasets[dataset["datasetId"]] = dataset
        return dataset

    def draft(self, dataset: JSON, size: int | None, part: int = 0) -> str:
        "A pre-signed URL that takes one PUT (again, if it has to be)."
        key, signature = new_id(dataset["datasetId"] + "-"), uuid.uuid4().hex
        self._drafts[key] = {"dataset": dataset, "size": size, "part": part, "signature": signature,
                             "path": self._folder / key}
        return f"{self.url}/storage/{key}?X-Amz-Signature={signature}"

    def upload_url(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        require(dataset["status"] == "DRAFT", "the dataset is not a draft", 9)
        size = int(body.get("sizeBytes", 0))
        require(size > 0, "size_bytes: must be positive")
        return {"datasetId": dataset["datasetId"], "uploadUrl": self.draft(dataset, size)}

    def start_multipart(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        require(dataset["status"] == "DRAFT", "the dataset is not a draft", 9)
        size, parts = int(body.get("sizeBytes", 0)), int(body.get("parts", 0))
        require(size > 0, "size_bytes: must be positive")
        require(1 <= parts <= 10_000, "parts: must be in [1, 10000]")
        dataset["_announced"], dataset["_parts"] = size, {}
        urls = [self.draft(dataset, None, part) for part in range(1, parts + 1)]
        return {"datasetId": dataset["datasetId"], "multipartUploadUrls": urls}

    def finish_multipart(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        told = {int(part.get("partNum", 0)): part.get("etag")
                for part in body.get("uploadedParts", [])}
        drafts = [draft for draft in self._drafts.values()
                  if draft["dataset"] is dataset and draft["part"]]
        require(told and [draft["part"] for draft in drafts] == sorted(told),
                "InvalidPart: parts are missing")
        for draft in drafts:
            part = draft["part"]
            require(draft.get("etag") == told[part], f"InvalidPart: the etag of part {part}")
            require(part == len(drafts) or draft["received"] >= self.min_part,
                    f"EntityTooSmall: part {part}")
        total, announced = sum(draft["received"] for draft in drafts), dataset["_announced"]
        require(total == announced, f"{total} bytes uploaded, {announced} announced")
        self.stored(dataset, total, [draft["path"] for draft in drafts])
        return {"datasetId": dataset["datasetId"]}

    def stored(self, dataset: JSON, size: int, paths: list[pathlib.Path]) -> None:
        dataset["_file"] = self._folder / f"{dataset['datasetId']}.jsonl"
        dataset["sizeBytes"] = str(size)
        if not self.discard:
            with open(dataset["_file"], "wb") as whole:
                for path in paths:
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)

    def upload(self, request: Recorded, key: str, pieces: Iterator[bytes]) -> Answer:
        "A PUT to a pre-signed URL, as an S3 takes it."
        draft = self._drafts.get(key)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        if draft is None or query.get("X-Amz-Signature") != [draft["signature"]]:
            return s3_error(403, "AccessDenied", "Access Denied")
        if "authorization" in request.headers:
            return s3_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if "content-length" not in request.headers:
            return s3_error(411, "MissingContentLength", "You must provide the Content-Length")
        length = int(request.headers["content-length"])
        if length == 0 or draft["size"] not in (None, length):
            return s3_error(400, "IncompleteBody", f"{draft['size']} bytes expected, not {length}")
        digest = hashlib.md5(usedforsecurity=False)
        mine = draft["path"].with_name(f"{key}.{uuid.uuid4().hex}")
        with open(os.devnull if self.discard else mine, "wb") as file:
            for piece in pieces:
                request.size += len(piece)
                if not self.discard:
                    digest.update(piece)
                    file.write(piece)
        if not self.discard:
            mine.replace(draft["path"])
        draft.update(received=length, etag=f'"{digest.hexdigest()}"')
        if not draft["part"]:
            self.stored(draft["dataset"], length, [draft["path"]])
        return Answer(b"", 200, {"ETag": draft["etag"]})

    def validate(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        require("_file" in dataset, "the dataset has no uploaded data", 9)
        dataset_id = dataset["datasetId"]
        total, errors = (0, []) if self.discard else self.check_rows(dataset)
        bad = len({row for error in errors for row in error["rowNumbers"]})

        def stage(status: str, fraction: float) -> JSON:
            dataset["status"] = {"FAILED": "DRAFT", "CANCELED": "DRAFT"}.get(status, "VALIDATING")
            if status == "COMPLETED":
                dataset.update(status="INVALID" if errors else "READY", updatedAt=now())
            counts = {"totalRows": total, "processedRows": int(total * fraction),
                      "validRows": int((total - bad) * fraction)}
            shown = {key: str(count) for key, count in counts.items()}
            kind = "dataset.v1.ValidateDatasetMetadata"
            return packed_any(kind, datasetId=dataset_id, **shown)

        def result() -> JSON:
            if errors:
                dataset["validationError"] = errors
            else:
                self.publish(dataset, total)
            kind = "dataset.v1.ValidateDatasetResponse"
            return packed_any(kind, datasetId=dataset_id, isValid=not errors, errors=errors)

        return self.begin(request, "Validate dataset", result, stage)()

    def check_rows(self, dataset: JSON) -> tuple[int, list[JSON]]:
        "The number of rows, and what is wrong with them."
        kinds: dict[str, dict[str, type]] = {
            "TextToTextGeneration": {"request": list, "response": str},
            "TextToTextGenerationRequest": {"request": list},
        }
        needed = kinds.get(dataset["taskType"], {})
        errors: dict[str, JSON] = {}

        def add(name: str, description: str, *rows: str) -> None:
            new = {"error": name, "errorDescription": description, "rowNumbers": []}
            errors.setdefault(name, new)["rowNumbers"].extend(rows)

        total = 0
        with open(dataset["_file"], "rb") as file:
            for total, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    add("InvalidJson", str(error), str(total))
                    continue
                fits = isinstance(row, dict) and all(
                    isinstance(row.get(name), kind) for name, kind in needed.items())
                if not fits:
                    names = ", ".join(needed)
                    add("InvalidSchema", f"an object with the fields {names} expected", str(total))
        if not total:
            add("EmptyDataset", "no rows")
        return total, list(errors.values())

    def publish(self, dataset: JSON, rows: int) -> None:
        dataset["rows"] = str(rows)
        if self.parquet:
            import pyarrow
            import pyarrow.parquet

            with open(dataset["_file"], "rb") as file:
                table = pyarrow.Table.from_pylist([json.loads(line) for line in file])
            dataset["_file"] = dataset["_file"].with_suffix(".parquet")
            pyarrow.parquet.write_table(table, dataset["_file"])

    def rows(self, dataset: JSON) -> list[JSON]:
        if dataset["_file"].suffix == ".parquet":
            import pyarrow.parquet

            rows: list[JSON] = pyarrow.parquet.read_table(dataset["_file"]).to_pylist()
            return rows
        with open(dataset["_file"], "rb") as file:
            return [json.loads(line) for line in file]

    def describe_dataset(self, request: Recorded, body: JSON) -> JSON:
        return {"dataset": public(self.find(self.datasets, body.get("datasetId"), "Dataset"))}

    def list_datasets(self, request: Recorded, body: JSON) -> JSON:
        require(body.get("folderId"), "folder_id: is required")
        filters: list[tuple[Any, Callable[[JSON], object]]] = [
            (body.get("status"), lambda dataset: dataset["status"] in body["status"]),
            (body.get("taskTypeFilter"),
             lambda dataset: dataset["taskType"] in body["taskTypeFilter"]),
            (body.get("datasetIds"), lambda dataset: dataset["datasetId"] in body["datasetIds"]),
            (body.get("datasetNamePattern"),
             lambda dataset: body["datasetNamePattern"] in dataset.get("name", "")),
            (True, lambda dataset: dataset.get("folderId") == body["folderId"]),
        ]
        found = [public(dataset) for dataset in list(self.datasets.values())
                 if all(test(dataset) for wanted, test in filters if wanted)]
        return self.page(body, found, "datasets")

    def page(self, body: JSON, found: list[JSON], name: str) -> JSON:
        size, token = int(body.get("pageSize", 0)) or 100, body.get("pageToken") or "page-0"
        require(0 < size <= 1000, "page_size: must be in [0, 1000]")
        require(re.fullmatch(r"page-\d+", token), "page_token: is invalid")
        start = int(token[5:])
        more = f"page-{start + size}" if start + size < len(found) else ""
        return {name: found[start : start + size], "nextPageToken": more}

    def delete_dataset(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        del self.datasets[dataset["datasetId"]]
        return {}

    def download_urls(self, request: Recorded, body: JSON) -> JSON:
        dataset = self.find(self.datasets, body.get("datasetId"), "Dataset")
        require(dataset["status"] == "READY", "the dataset is not ready", 9)
        file = {"key": dataset["_file"].name, "url": self.presigned(dataset["_file"])}
        return {"datasetId": dataset["datasetId"], "downloadUrls": [file]}

    def presigned(self, path: pathlib.Path) -> str:
        key = new_id("get-")
        self._files[key] = path
        return f"{self.url}/storage/{key}?X-Amz-Signature={uuid.uuid4().hex}"

    def download(self, request: Recorded, key: str) -> Answer:
        if "authorization" in request.headers:
            return s3_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if key not in self._files:
            return s3_error(403, "AccessDenied", "Access Denied")
        path = self._files[key]

        def blocks() -> Iterator[bytes]:
            with open(path, "rb") as file:
                yield from iter(lambda: file.read(1 << 16), b"")

        size = str(path.stat().st_size)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": size}
        return Answer(blocks(), 200, headers)

    # Tuning

    def tune(self, request: Recorded, body: JSON) -> JSON:
        base = body.get("baseModelUri", "")
        self.check_model(base)
        require("textToTextCompletion" in body, "tuning_params: is required")
        require(body.get("trainDatasets"), "train_datasets: must not be empty")
        for weighted in body["trainDatasets"] + body.get("validationDatasets", []):
            dataset = self.find(self.datasets, weighted.get("datasetId"), "Dataset")
            require(dataset["status"] == "READY", "the dataset is not ready", 9)
        return self.once(request, lambda: self.new_tuning(request, body, base))

    def new_tuning(self, request: Recorded, body: JSON, base: str) -> Callable[[], JSON]:
        folder = base.split("/")[2]
        known: JSON = {key: body[key] for key in ("name", "description", "labels") if key in body}
        task: JSON = {"taskId": new_id("ftn"), "folderId": folder, "sourceModelUri": base,
                      "createdBy": USER, "createdAt": now(), **known, "_request": body}

        def stage(status: str, fraction: float) -> JSON:
            move(task, status)
            task["_step"] = int(100 * fraction)
            return packed_any("tuning.v1.TuningMetadata", tuningTaskId=task["taskId"], status=status,
                              totalSteps="100", currentStep=str(task["_step"]))

        def result() -> JSON:
            versioned = base if base.count("/") == 4 else base + "/latest"
            task["targetModelUri"] = versioned.split("@")[0] + "@" + new_id("tamr")
            return packed_any("tuning.v1.TuningResponse", tuningTaskId=task["taskId"],
                              status="COMPLETED", targetModelUri=task["targetModelUri"])

        self.tunings[task["taskId"]] = task
        return self.begin_task(request, "Tuning", task, result, stage)

    def describe_tuning(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.tunings, body.get("tuningTaskId"), "Tuning task")
        if task["operationId"] not in self.operations:
            self.poll(task["_operation"])  # the operation is forgotten, the work goes on
        return {"tuningTask": public(task)}

    def list_tunings(self, request: Recorded, body: JSON) -> JSON:
        found = [public(task) for task in list(self.tunings.values())
                 if task["folderId"] == body.get("folderId")
                 and task["status"] == body.get("status", task["status"])]
        return self.page(body, found, "tuningTasks")

    def cancel_tuning(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.tunings, body.get("tuningTaskId"), "Tuning task")
        self.cancel(task["_operation"])
        return {"tuningTaskId": task["taskId"]}

    def metrics_url(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.tunings, body.get("taskId"), "Tuning task")
        if not task["_step"]:
            return {"loadUrl": ""}
        path = self._folder / f"{task['taskId']}.json"
        path.write_text(json.dumps({"step": task["_step"], "loss": 1 / (1 + task["_step"])}))
        return {"loadUrl": self.presigned(path)}

    # Batches

    def batch(self, request: Recorded, body: JSON) -> JSON:
        self.check_model(body.get("modelUri", ""))
        source = self.find(self.datasets, body.get("sourceDatasetId"), "Dataset")
        require(source["status"] == "READY", "the dataset is not ready", 9)
        return self.once(request, lambda: self.new_batch(request, body, source))

    def new_batch(self, request: Recorded, body: JSON, source: JSON) -> Callable[[], JSON]:
        task_id = new_id("fbi")
        task: JSON = {
            "taskId": task_id, "modelUri": body["modelUri"], "completionRequest": body,
            "folderId": body["modelUri"].split("/")[2], "sourceDatasetId": source["datasetId"],
            "createdBy": USER, "createdAt": now(), "errors": {"status": {}},
        }

        def stage(status: str, fraction: float) -> JSON:
            move(task, status)
            if status in ("PENDING", "IN_PROGRESS", "COMPLETED") and "resultDatasetId" not in task:
                fields = {"folderId": task["folderId"], "name": f"batch {task_id}",
                          "taskType": source["taskType"]}
                task["resultDatasetId"] = self.new_dataset(fields)["datasetId"]
            if status == "FAILED":
                error = task["_operation"]["error"]
                line = {"lineNumber": "1", "message": error["message"]}
                task["errors"] = {"status": error, "lineErrors": [line]}
            kind = "foundation_models.v1.BatchCompletionMetadata"
            return packed_any(kind, taskId=task_id, taskStatus=status, totalBatches="10",
                              completedBatches=str(int(10 * fraction)))

        def result() -> JSON:
            stage("IN_PROGRESS", 1.0)
            self.batch_result(task, source)
            kind = "foundation_models.v1.BatchCompletionResponse"
            return packed_any(kind, taskId=task_id, taskStatus="COMPLETED",
                              resultDatasetId=task["resultDatasetId"])

        self.batches[task_id] = task
        return self.begin_task(request, "Batch completion", task, result, stage)

    def batch_result(self, task: JSON, source: JSON) -> None:
        "The source's rows, each with the model's response."
        dataset = self.datasets[task["resultDatasetId"]]
        dataset["_file"] = self._folder / f"{dataset['datasetId']}.jsonl"
        rows = [] if self.discard else self.rows(source)
        with open(dataset["_file"], "w", encoding="utf-8") as file:
            for row in rows:
                body = {**task["completionRequest"], "messages": row["request"]}
                message = self.complete(body, body)[0]
                line = {"request": row["request"], "response": message.get("text", "")}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.publish(dataset, len(rows))
        dataset.update(status="READY", sizeBytes=str(dataset["_file"].stat().st_size))

    def describe_batch(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.batches, body.get("taskId"), "Batch inference task")
        self.poll(task["_operation"])
        return {"task": public(task)}

    def cancel_batch(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.batches, body.get("taskId"), "Batch inference task")
        self.cancel(task["_operation"])
        return {"taskId": task["taskId"]}

    def delete_batch(self, request: Recorded, body: JSON) -> JSON:
        task = self.find(self.batches, body.get("taskId"), "Batch inference task")
        require(task["status"] in DONE, "the task is still running", 9)
        return {"taskId": self.batches.pop(task["taskId"])["taskId"]}

    def rpc_operation(self, request: Recorded, body: JSON) -> JSON:
        return self.get_operation(request, body.get("operationId", ""))

    def rpc_cancel(self, request: Recorded, body: JSON) -> JSON:
        return self.cancel_operation(request, body.get("operationId", ""))

    # The service's table of contents

    ROUTES: ClassVar[dict[tuple[str, str], Callable[..., JSON | Answer]]] = {
        ("POST", "/foundationModels/v1/completion"): completion,
        ("POST", "/foundationModels/v1/completionAsync"): completion_async,
        ("POST", "/foundationModels/v1/tokenizeCompletion"): tokenize_completion,
        ("POST", "/foundationModels/v1/tokenize"): tokenize,
        ("GET", "/operations/([^/:]+)"): get_operation,
        ("GET", "/operations/([^/:]+):cancel"): cancel_operation,
        ("POST", "/iam/v1/tokens"): exchange_token,
        ("GET", "/computeMetadata/v1/instance/service-accounts/default/token"): metadata_token,
        ("POST", "/v1/chat/completions"): chat,
        ("GET", "/v1/models"): models,
        ("PUT", "/storage/([^/]+)"): upload,
        ("GET", "/storage/([^/]+)"): download,
    }
    PUBLIC: ClassVar[set[Any]] = {exchange_token, metadata_token, download}  # need no credential

    METHODS: ClassVar[dict[str, tuple[str, str, Callable[[Any, Recorded, JSON], JSON]]]] = {
        f"/yandex.cloud.{path}": method for path, method in {
            # service and method: request message, answer message, handler
            f"{TUNING}/Tune": ("TuningRequest", "Operation", tune),
            f"{TUNING}/Describe": ("TuningTaskId", "TuningDescription", describe_tuning),
            f"{TUNING}/List": ("ListTuningsRequest", "ListTuningsResponse", list_tunings),
            f"{TUNING}/Cancel": ("TuningTaskId", "TuningTaskId", cancel_tuning),
            f"{TUNING}/GetMetricsUrl": ("TaskId", "MetricsUrl", metrics_url),
            f"{DATASET}/Create": ("CreateDatasetRequest", "CreateDatasetResponse", create_dataset),
            f"{DATASET}/GetUploadDraftUrl": ("DraftUrlRequest", "DraftUrl", upload_url),
            f"{DATASET}/StartMultipartUploadDraft": (
                "StartMultipartRequest", "StartMultipartResponse", start_multipart),
            f"{DATASET}/FinishMultipartUploadDraft": (
                "FinishMultipartRequest", "DatasetId", finish_multipart),
            f"{DATASET}/Validate": ("DatasetId", "Operation", validate),
            f"{DATASET}/Describe": ("DatasetId", "DatasetDescription", describe_dataset),
            f"{DATASET}/List": ("ListDatasetsRequest", "ListDatasetsResponse", list_datasets),
            f"{DATASET}/Delete": ("DatasetId", "Empty", delete_dataset),
            f"{DATASET}/GetDownloadUrls": ("DatasetId", "DownloadUrls", download_urls),
            f"{BATCH}/Describe": ("TaskId", "BatchDescription", describe_batch),
            f"{BATCH}/Cancel": ("TaskId", "TaskId", cancel_batch),
            f"{BATCH}/Delete": ("TaskId", "TaskId", delete_batch),
            "ai.foundation_models.v1.TextGenerationBatchService/Completion": (
                "BatchCompletionRequest", "Operation", batch),
            "operation.OperationService/Get": ("OperationId", "Operation", rpc_operation),
            "operation.OperationService/Cancel": ("OperationId", "Operation", rpc_cancel),
        }.items()
    }


# --- Demo and server -----------------------------------------------------------


class Example(NamedTuple):
    "A block of README, and what it prints there."

    code: str
    shown: str | None
    needs: str  # a package that has to be installed
    console: bool


def examples(readme: str) -> list[Example]:
    "README's blocks of Python and of console, in their order."
    found = []
    block = re.compile(r"```(python|console)(?: (\w+))?\n(.*?)```(?:\n```text\n(.*?)```)?", re.S)
    for match in block.finditer(readme):
        kind, needs, code, shown = match.groups()
        if kind == "console":
            for command in re.finditer(r"^\$ (.*)\n((?:[^$].*\n)*)", code, re.M):
                found.append(Example(command[1], command[2], needs or "", True))
        else:
            found.append(Example(code, shown, needs or "", False))
    return found


def run_example(example: Example, names: dict[str, Any]) -> str:
    "What it prints; Python shares `names` with the examples before it, console is the command."
    import contextlib
    import io
    import shlex
    import sys

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if example.console:
            echo, _, command = example.code.rpartition(" | ")
            before, sys.stdin = sys.stdin, io.StringIO("".join(shlex.split(echo)[1:]))
            try:
                import yandex_gpt

                yandex_gpt.main(shlex.split(command)[1:])
            finally:
                sys.stdin = before
        else:
            exec(compile(example.code, "README.md", "exec"), names)
    return out.getvalue()


def tour(server: LocalYandexGPT) -> None:
    "README's examples against the stand-in, with what a user would see."
    os.environ.update(YANDEX_GPT_ENDPOINT=server.url, YC_FOLDER_ID="b1glocal", YC_API_KEY="local")
    names: dict[str, Any] = {"__name__": "__main__"}
    readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for example in examples(readme):
        print("\n" + "\n".join(("$ " if example.console else ">>> ") + line for line in example.code.splitlines()))
        if example.needs:
            print(f"(not run here: it needs {example.needs})")
        else:
            print(run_example(example, names).rstrip())


def serve(port: int) -> int:
    "Keeps the stand-in up until Ctrl-C."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with LocalYandexGPT(port, delay=0.03) as server:
        print(f"export YANDEX_GPT_ENDPOINT={server.url}")
        print("# any API key will do: export YC_API_KEY=local YC_FOLDER_ID=b1glocal", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="YandexGPT on this machine: a demo, or a server.")
    commands = parser.add_subparsers(dest="command")
    server_command = commands.add_parser("serve", help="keep the stand-in up for your own scripts")
    server_command.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args(argv)
    if arguments.command == "serve":
        return serve(arguments.port)
    with LocalYandexGPT(delay=0.01) as server:
        tour(server)
    return 0


if __name__ == "__main__":  # above the imports of the tests: the demo needs requests alone
    raise SystemExit(main())

import dataclasses
import doctest
import enum
import importlib
import importlib.util
import inspect
import io
import math
import multiprocessing
import pickle
import random
import ssl
import subprocess
import sys
import textwrap
import types
import warnings
from typing import Annotated, Literal, NewType, Optional, TypedDict, Union

import pytest
import requests
import responses

import yandex_gpt
from yandex_gpt import (
    AdamW,
    Alternative,
    APIError,
    APIKeyAuth,
    AuthenticationError,
    BadRequestError,
    ChatModel,
    ClientConfig,
    ConfigError,
    ConnectionFailed,
    ConstantScheduler,
    CosineScheduler,
    Dataset,
    DatasetValidationError,
    DeadlineExceeded,
    EnvIAMTokenAuth,
    FunctionTool,
    IAMTokenAuth,
    InvalidResponse,
    LinearScheduler,
    Lora,
    MetadataAuth,
    Model,
    ModelConfig,
    NoAuth,
    NotFoundError,
    OAuthTokenAuth,
    Operation,
    OperationError,
    OperationNotReady,
    OperationStatus,
    PermissionDeniedError,
    PollTimeout,
    PromptTune,
    RateLimitError,
    Result,
    RetryConfig,
    ServerError,
    Status,
    StreamInterrupted,
    TextMessage,
    Token,
    ToolCall,
    ToolLoopError,
    Usage,
    YandexCloudCLIAuth,
    YandexGPTError,
)  # fmt: skip

# --- Fixtures -------------------------------------------------------------------------------------

KEY = "AQVN-secret-key-0123456789"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    "No credential, endpoint or proxy of the machine's own; nothing listens at the metadata address."
    for name in list(os.environ):
        if name.startswith(("YC_", "YANDEX_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:9")
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if name == "yc" else found(name, **more))


@pytest.fixture
def server() -> Iterator[LocalYandexGPT]:
    with LocalYandexGPT() as running:
        yield running
        assert not running.unused, f"queued faults that nothing met: {running.unused}"


@pytest.fixture
def client(server: LocalYandexGPT) -> ClientConfig:
    return ClientConfig(folder_id="b1gtest", auth=KEY, endpoint=server.url)


@pytest.fixture
def model(client: ClientConfig) -> Model:
    return Model("yandexgpt", client=client)


@pytest.fixture
def chat(client: ClientConfig) -> ChatModel:
    return ChatModel("gpt-oss-120b", client=client)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    "Pauses are recorded instead of slept, and are as long as full jitter lets them be."
    pauses: list[float] = []
    monkeypatch.setattr(yandex_gpt.time, "sleep", pauses.append)
    monkeypatch.setattr(yandex_gpt.random, "uniform", lambda low, high: high)
    return pauses


def patient(config: ClientConfig, **changes: Any) -> ClientConfig:
    return dataclasses.replace(config, retry=RetryConfig(initial_backoff=0.001, **changes))


GAUGE = "ai.textGenerationCompletionSessionsCount.count gauge quota limit exceed: allowed 10 requests"


def refusal(status: int, code: int, message: str) -> dict[str, Any]:
    return {"error": {"grpcCode": code, "httpCode": status, "message": message, "details": []}}


# --- Configs and credentials ----------------------------------------------------------------------


@pytest.mark.parametrize(("value", "header"), [
    pytest.param("AQVN123", "Api-Key AQVN123", id="anything else is an API key"),
    pytest.param("t1.abc", "Bearer t1.abc", id="IAM token"),
    pytest.param("  AQVN123\n", "Api-Key AQVN123", id="pasted with white space"),
    pytest.param(lambda: "t1.called", "Bearer t1.called", id="function"),
    pytest.param(lambda: "AQVNcalled", "Api-Key AQVNcalled", id="function giving a key"),
    pytest.param(APIKeyAuth("t1.no"), "Api-Key t1.no", id="said outright: key"),
    pytest.param(IAMTokenAuth("key"), "Bearer key", id="said outright: token"),
    pytest.param(NoAuth(), None, id="none"),
])
def test_auth_is_told_by_its_form(server: LocalYandexGPT, client: ClientConfig, value: Any, header: Any) -> None:
    model = Model("yandexgpt", client=client, auth=value)
    with contextlib.suppress(AuthenticationError):
        model.run("hi")
    sent = server.requests[0].headers
    assert sent.get("authorization") == header
    assert ("x-folder-id" in sent) == (header or "").startswith("Bearer")
    assert uuid.UUID(sent["x-client-request-id"]).version == 4
    assert re.fullmatch(r"yandex-gpt/[\d.]+ python/3\.\d+", sent["user-agent"])


@pytest.mark.parametrize(("environment", "header"), [
    pytest.param({"YC_API_KEY": "k", "YC_IAM_TOKEN": "t1.i"}, "Api-Key k", id="key first"),
    pytest.param({"YC_IAM_TOKEN": "t1.i", "YC_TOKEN": "t1.t"}, "Bearer t1.i", id="then IAM token"),
    pytest.param({"YC_TOKEN": "t1.t"}, "Bearer t1.t", id="YC_TOKEN after metadata"),
])
def test_environment_gives_the_credential(
    server: LocalYandexGPT, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], header: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Model("yandexgpt", folder_id="b1g", client=ClientConfig(endpoint=server.url)).run("hi")
    assert server.requests[-1].headers["authorization"] == header


def test_metadata_service_gives_a_token_that_is_kept(server: LocalYandexGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YC_METADATA_ADDR", server.url[len("http://"):])
    model = Model("yandexgpt", folder_id="b1g", client=ClientConfig(endpoint=server.url))
    model.run("hi")
    model.run("hi")
    assert [r.path for r in server.requests].count("/foundationModels/v1/completion") == 2
    assert server.issued("metadata") == 1
    assert server.requests[0].headers["metadata-flavor"] == "Google"


def test_one_of_32_threads_renews_an_expired_token(server: LocalYandexGPT, client: ClientConfig) -> None:
    model = Model("yandexgpt", client=client, auth="y0_oauth")
    model.run("hi")
    server.expire_tokens()
    results = list(model.run_many(["hi"] * 32, workers=32))
    assert len(results) == 32
    assert server.issued("oauth") == 2


def test_a_refused_key_is_not_sent_twice_but_a_rotated_token_is(server: LocalYandexGPT, client: ClientConfig) -> None:
    server.keys = {"t1.new"}
    with pytest.raises(AuthenticationError, match="API key"):
        Model("yandexgpt", client=client).run("hi")
    assert len(server.requests) == 1
    tokens = iter(["t1.old", "t1.new"])
    assert Model("yandexgpt", client=client, auth=lambda: next(tokens)).run("hi").text
    assert len(server.requests) == 3


def test_without_credentials_the_error_lists_what_was_tried(server: LocalYandexGPT) -> None:
    model = Model("yandexgpt", folder_id="b1g", client=ClientConfig(endpoint=server.url))
    with pytest.raises(ConfigError) as caught:
        model.run("hi")
    for name in ("YC_API_KEY", "YC_IAM_TOKEN", "YC_OAUTH_TOKEN", "metadata", "YC_TOKEN", "yc"):
        assert name in str(caught.value)
    assert not server.requests


def test_yc_command_is_the_last_resort(
    server: LocalYandexGPT, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    command = tmp_path / "yc"
    command.write_text('#!/bin/sh\n[ "$*" = "iam create-token" ] && echo t1.fromyc\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(shutil, "which", lambda name: str(command))
    Model("yandexgpt", folder_id="b1g", client=ClientConfig(endpoint=server.url)).run("hi")
    assert server.requests[-1].headers["authorization"] == "Bearer t1.fromyc"


WRONG_CONFIGS: list[Any] = [
    lambda: ClientConfig(folder_id="b1g/x"), lambda: ClientConfig(folder_id=".."),
    lambda: ClientConfig(auth="a\nb"), lambda: ClientConfig(auth="ключ"), lambda: ClientConfig(auth=""),
    lambda: ClientConfig(auth=5), lambda: ClientConfig(endpoint="ftp://x"), lambda: ClientConfig(endpoint="localhost"),
    lambda: ClientConfig(endpoint="http://user:pw@127.0.0.1"), lambda: ClientConfig(endpoint="http://127.0.0.1:99999"),
    lambda: ClientConfig(endpoint="http://example.com", auth="key"),
    lambda: ClientConfig(grpc_endpoint="grpc://example.com:443", auth="key"),
    lambda: ClientConfig(max_concurrency=0), lambda: ClientConfig(verify=5), lambda: ClientConfig(retry=3),
    lambda: RetryConfig(max_attempts=0), lambda: RetryConfig(multiplier=float("nan")),
    lambda: Model("yandexgpt"), lambda: Model("yandex gpt", folder_id="b1g"), lambda: Model("", folder_id="b1g"),
    lambda: Model("m", folder_id="b1g").run_stream("x", timeout=0),
    lambda: Model("m", folder_id="b1g").run("x", timeout=float("inf")),
    lambda: Model("m", folder_id="b1g").run([]),
    lambda: Model("m", folder_id="b1g").attach_deferred("a/b"),
]


@pytest.mark.parametrize("make", WRONG_CONFIGS)
def test_a_wrong_config_is_refused_before_anything_is_sent(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "pw" not in str(caught.value)


def test_an_echoed_secret_shows_in_no_error(server: LocalYandexGPT, client: ClientConfig) -> None:
    server.next(Reply(200, {"you": KEY}), Stream([line("a"), {"you": KEY}]), Stream([{"error": KEY}]))
    model = Model("yandexgpt", client=client)
    for ask in (lambda: model.run("hi"), lambda: list(model.run_stream("hi")), lambda: list(model.run_stream("hi"))):
        with pytest.raises(YandexGPTError) as caught:
            ask()
        assert KEY not in str(caught.value)
    server.next(Reply(400, {"code": 3, "message": "y0_secret is no token"}), path="/iam/")
    with pytest.raises(BadRequestError) as refused:
        Model("yandexgpt", client=client, auth="y0_secret").run("hi")
    assert "y0_secret" not in str(refused.value)


def test_a_whole_uri_brings_its_folder(server: LocalYandexGPT) -> None:
    model = Model("gpt://b1guri/yandexgpt/latest", auth="t1.x", client=ClientConfig(endpoint=server.url))
    model.run("hi")
    assert server.requests[0].headers["x-folder-id"] == "b1guri"


def test_http_is_for_loopback_or_for_nobody_s_credential() -> None:
    ClientConfig(endpoint="http://[::1]:80", auth="k")
    ClientConfig(endpoint="http://gateway.lan", auth=NoAuth())
    model = Model("m", folder_id="b", client=ClientConfig(endpoint="http://gateway.lan"))
    with pytest.raises(ConfigError, match="NoAuth"):
        model.run("hi")  # whatever the environment would give is a secret too


@pytest.mark.parametrize(("change", "error"), [
    ({"temperature": "hot"}, TypeError), ({"max_tokens": 1.5}, TypeError), ({"max_tokens": True}, TypeError),
    ({"colour": 1}, TypeError), ({"tool_choice": "maybe"}, ValueError), ({"response_format": "xml"}, ValueError),
    ({"response_format": 5}, TypeError), ({"tools": [5]}, TypeError), ({"extra_query": [1]}, TypeError),
])
def test_configure_refuses_what_cannot_be(change: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Model("m", folder_id="b").configure(**change)


def test_configure_gives_a_new_model_and_none_unsets() -> None:
    first = Model("m", folder_id="b")
    second = first.configure(temperature=0.5, max_tokens=10)
    assert (first.config.temperature, second.config.temperature) == (None, 0.5)
    assert second.configure(temperature=None).config == ModelConfig(max_tokens=10)
    assert first == Model("m", folder_id="b")
    assert hash(first) == hash(Model("m", folder_id="b"))
    assert first != second


def test_the_folder_is_settled_when_the_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YC_FOLDER_ID", "b1genv")
    model = Model("yandexgpt", version="rc")
    monkeypatch.delenv("YC_FOLDER_ID")
    assert pickle.loads(pickle.dumps(model)).uri == "gpt://b1genv/yandexgpt/rc"
    assert Model("gpt://b1gother/tuned/latest").uri == "gpt://b1gother/tuned/latest"


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "body", "kind", "code", "words"), [
    (400, refusal(400, 3, "bad uri"), BadRequestError, "INVALID_ARGUMENT", ["bad uri", "gpt://b1gtest/yandexgpt/latest", "b1gtest"]),
    (401, {"code": 16, "message": "no"}, AuthenticationError, "UNAUTHENTICATED", ["API key"]),
    (403, refusal(403, 7, "denied"), PermissionDeniedError, "PERMISSION_DENIED", ["ai.languageModels.user", "b1gtest"]),
    (404, refusal(404, 5, "no model"), NotFoundError, "NOT_FOUND", ["gpt://b1gtest/yandexgpt/latest"]),
    (429, refusal(429, 8, GAUGE), RateLimitError, "RESOURCE_EXHAUSTED", ["ai.textGenerationCompletionSessionsCount.count", "max_concurrency"]),
    (500, {"error": "text"}, ServerError, "INTERNAL", ["text"]),
    (502, "<html><head><title>502 Bad Gateway</title></head></html>", ServerError, "INTERNAL", ["502 Bad Gateway"]),
    (503, b"", ServerError, "UNAVAILABLE", ["no message"]),
    (501, {"error": {"message": "soon", "type": "x", "code": "unknown_url"}}, ServerError, "UNIMPLEMENTED", ["soon"]),
    (302, None, APIError, "UNKNOWN", ["Redirects"]),
    (409, refusal(409, 6, "exists"), APIError, "ALREADY_EXISTS", ["exists"]),
])
def test_an_answer_becomes_the_error_of_its_status(
    server: LocalYandexGPT, client: ClientConfig, status: int, body: Any, kind: type[APIError], code: str, words: list[str]
) -> None:
    once = dataclasses.replace(client, retry=RetryConfig(max_attempts=1))
    server.next(Reply(status, body))
    with pytest.raises(kind) as caught:
        Model("yandexgpt", client=once).run("hi")
    error = caught.value
    assert type(error) is kind
    assert (error.status_code, error.code) == (status, code)
    assert error.request_id
    assert error.client_request_id == server.requests[0].headers["x-client-request-id"]
    for word in [*words, error.request_id]:
        assert word in str(error)


@pytest.mark.parametrize(("value", "seconds"), [
    ("3", 3.0), ("0", 0.0), ("1.5", 1.5), ("", None), ("soon", None), ("nan", None), ("inf", None), ("-1", None),
    ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("Fri, 99 Dec 1999", None),
])
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert yandex_gpt._retry_after(value) == seconds


def test_secrets_show_nowhere(server: LocalYandexGPT, client: ClientConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    model = Model("yandexgpt", client=patient(client))
    server.next(Reply(503), Reply(400, refusal(400, 3, f"you sent {KEY}")))
    with pytest.raises(BadRequestError) as caught:
        model.run("my private prompt")
    server.next(Reply(200, f"no json {KEY}"))
    with pytest.raises(InvalidResponse) as broken:
        model.run("my private prompt")
    shown = repr((model, model.client, model.client.auth)) + str(caught.value) + caught.value.message
    shown += str(broken.value) + caplog.text
    assert KEY not in shown
    assert "private" not in shown
    assert "completion" in caplog.text
    assert "WARNING" in caplog.text


# --- Messages and results -------------------------------------------------------------------------

ANSWER = Alternative("assistant", "Hi", Status.FINAL)


@pytest.mark.parametrize(("messages", "sent"), [
    ("hi", [{"role": "user", "text": "hi"}]),
    ({"role": "system", "text": "s"}, [{"role": "system", "text": "s"}]),
    ([{"role": "system", "content": "s"}, "u"], [{"role": "system", "text": "s"}, {"role": "user", "text": "u"}]),
    (TextMessage("system", "s"), [{"role": "system", "text": "s"}]),
    (["u", ANSWER], [{"role": "user", "text": "u"}, {"role": "assistant", "text": "Hi"}]),
    (["u", Result((ANSWER,), None, "")], [{"role": "user", "text": "u"}, {"role": "assistant", "text": "Hi"}]),
    (iter(["a", "b"]), [{"role": "user", "text": "a"}, {"role": "user", "text": "b"}]),
    ({"tool_results": [{"name": "f", "content": "x"}]}, [{"role": "user", "toolResultList": {"toolResults": [
        {"functionResult": {"name": "f", "content": "x"}}]}}]),
    (Alternative("assistant", "", Status.TOOL_CALLS, (ToolCall("f", {"a": 1.0}),)), [
        {"role": "assistant", "toolCallList": {"toolCalls": [{"functionCall": {"name": "f", "arguments": {"a": 1.0}}}]}}]),
])
def test_every_form_of_message_is_accepted(messages: Any, sent: Any) -> None:
    normalized = yandex_gpt._normalize(messages)
    assert Model("m", folder_id="b")._encode(normalized, stream=False)["messages"] == sent
    assert yandex_gpt._normalize(normalized) == normalized


@pytest.mark.parametrize("item", [
    5, None, b"bytes", ["nested"], {"role": "user"}, {"text": 5}, {"role": 5, "text": "x"}, {"role": "user", "txt": "x"},
    {"tool_results": "x"}, {"tool_results": [{"name": "f"}]}, {"role": "user", "content": [5]}, {"role": "", "text": "x"},
])
def test_anything_else_is_a_type_error_with_its_place(item: Any) -> None:
    with pytest.raises(TypeError, match=r"messages\[1\]"):
        Model("m", folder_id="b", auth="k").run(["fine", item])


def test_content_parts_are_for_chat_models() -> None:
    with pytest.raises(TypeError, match=r"messages\[0\].*ChatModel"):
        Model("m", folder_id="b", auth="k").run({"role": "user", "content": ["text"]})


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="surrogate"):
        Model("m", folder_id="b", auth="k").run("a\ud800b")


@pytest.mark.parametrize("text", ["\u2028 and \u0085", "日本語 🎉", "x" * 10_000_000, "\r\n\t\x00"], ids=["separators", "unicode", "10 MB", "control"])
def test_any_text_goes_there_and_comes_back(server: LocalYandexGPT, model: Model, text: str) -> None:
    server.next(Reply(200, line(text, "FINAL")), Stream([line(text[:10]), line(text, "FINAL")]))
    assert model.run(text).text == text
    assert list(model.run_stream(text))[-1].text == text
    assert [r.json["messages"][0]["text"] for r in server.requests] == [text, text]


def test_a_result_is_a_sequence_with_shortcuts(model: Model) -> None:
    result = model.run("hello")
    assert result.text == str(result) == result[0].text == result.delta == "Hello! How can I help you?"
    assert len(result) == 1
    assert (result.role, result.status, result.tool_calls) == ("assistant", Status.FINAL, None)
    assert isinstance(result.usage, Usage)
    assert result.usage.total_tokens == result.usage.input_text_tokens + result.usage.completion_tokens > 0
    assert result.raw["result"]["alternatives"]
    assert "raw" not in repr(result)
    assert json.loads(json.dumps(result.to_dict()))["alternatives"][0]["text"] == result.text
    assert dataclasses.replace(result, raw=None) == result
    assert model.run([*result.messages, "more"]).text.startswith("You said: more")


def test_unknown_fields_and_statuses_of_a_later_service_are_survived(server: LocalYandexGPT, model: Model) -> None:
    later = {"result": {"alternatives": [{"message": {"role": "assistant", "text": "x", "mood": "good"},
                                          "status": "ALTERNATIVE_STATUS_TIRED"}], "usage": {"totalTokens": 7}, "new": 1}}
    server.next(Reply(200, later))
    result = model.run("hi")
    assert (result.status, result.usage) == (Status.UNSPECIFIED, Usage(0, 0, 7))
    server.next(Stream([later]))
    assert [r.text for r in model.run_stream("hi")] == ["x"]


@pytest.mark.parametrize("body", [
    "not json", "[1]", "", '{"result": {}}', '{"result": {"alternatives": []}}', '{"result": {"alternatives": [5]}}',
    '{"result": {"alternatives": [{"message": {"text": 5}}]}}', "[" * 100_000, '{"a": ' + "1" * 10_000 + "}",
    '{"result": {"alternatives": [{"message": {"text": "x"}}], "usage": {"totalTokens": "many"}}}',
])
def test_a_broken_answer_is_an_invalid_response(server: LocalYandexGPT, model: Model, body: str) -> None:
    server.next(Reply(200, body))
    with pytest.raises(InvalidResponse):
        model.run("hi")
    assert len(server.requests) == 1  # paid for: not asked again


def test_tokenize_counts_the_template_too(server: LocalYandexGPT, model: Model) -> None:
    tokens = model.tokenize("hello")
    assert all(isinstance(token, Token) and isinstance(token.id, int) for token in tokens)
    assert any(token.special for token in tokens)
    assert server.requests[0].path.endswith("tokenizeCompletion")


# --- Streams --------------------------------------------------------------------------------------


def line(text: str, status: str = "PARTIAL") -> dict[str, Any]:
    alternative = {"message": {"role": "assistant", "text": text}, "status": f"ALTERNATIVE_STATUS_{status}"}
    return {"result": {"alternatives": [alternative], "usage": {}, "modelVersion": "1"}}


def test_a_stream_grows_and_its_deltas_make_the_text(server: LocalYandexGPT, model: Model) -> None:
    stream = model.run_stream("hello")
    assert not server.requests  # nothing is sent before the first next()
    results = list(stream)
    assert "".join(r.delta for r in results) == results[-1].text == "Hello! How can I help you?"
    assert [r.status for r in results[:-1]] == [Status.PARTIAL] * (len(results) - 1)
    assert results[-1].status is Status.FINAL
    assert results[-1].usage
    list(model.run_stream("hello"))
    assert len({r.connection for r in server.requests}) == 1  # read to its end, a connection is reused


@pytest.mark.parametrize("fault", [Split(1), Split(7), Gzip(), NoLength()], ids=repr)
def test_a_stream_is_the_same_however_its_bytes_come(server: LocalYandexGPT, model: Model, chat: ChatModel, fault: Any) -> None:
    server.answer = lambda body: "Привет,\u2028 мир 🎉 " * 5
    for each in (model, chat):
        server.next(fault)
        assert list(each.run_stream("hi"))[-1].text == server.answer(None)
        server.next(fault)
        assert each.run("hi").text == server.answer(None)


def test_no_chunk_waits_for_the_next_one(server: LocalYandexGPT, model: Model) -> None:
    server.next(Stream([line("a"), 30.0, line("ab", "FINAL")]))
    stream = model.run_stream("hi", timeout=5)
    assert next(stream).text == "a"
    stream.close()
    assert server.wait_for(lambda s: s.open_connections == 0)


def test_no_chunk_waits_for_the_next_one_without_http_chunks(server: LocalYandexGPT, model: Model) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    server.next(Raw(head + json.dumps(line("a")).encode() + b"\n", close=False))
    stream = model.run_stream("hi", timeout=5)
    assert next(stream).text == "a"
    stream.close()


@pytest.mark.parametrize(("fault", "error", "text"), [
    pytest.param(Stream([line("a")], final=False), StreamInterrupted, "a", id="cut after a chunk"),
    pytest.param(Stream([line("a")]), StreamInterrupted, "a", id="ends cleanly, never said final"),
    pytest.param(Stream([line("a"), '{"result": {"alt']), StreamInterrupted, "a", id="ends within a line"),
    pytest.param(Stream([line("a"), "nonsense\n"]), InvalidResponse, "a", id="a line that is no JSON"),
    pytest.param(Stream([line("a"), refusal(429, 8, "quota limit")]), RateLimitError, "a", id="error line after 200"),
    pytest.param(Stream([line("a"), {"error": {"message": "x", "code": 14}}]), ServerError, "a", id="error line without status"),
    pytest.param(Stream([]), StreamInterrupted, None, id="empty"),
])
def test_a_stream_that_fails_keeps_what_came(server: LocalYandexGPT, model: Model, fault: Any, error: Any, text: Any) -> None:
    server.next(fault)
    got = []
    with pytest.raises(error) as caught:
        for result in model.run_stream("hi"):
            got.append(result)
    assert caught.value.partial is (got[-1] if got else None)
    assert (caught.value.partial.text if got else None) == text
    assert caught.value.client_request_id == server.requests[0].headers["x-client-request-id"]
    assert caught.value.request_id
    assert server.wait_for(lambda s: s.open_connections == 0 or fault.final)


@pytest.mark.parametrize("fault", [Reset(), Reply(503), Cut(0), Stream([refusal(429, 8, GAUGE)])], ids=repr)
def test_before_its_first_chunk_a_stream_is_sent_again(server: LocalYandexGPT, client: ClientConfig, fault: Any) -> None:
    server.next(fault)
    assert list(Model("yandexgpt", client=patient(client)).run_stream("hello"))[-1].text
    assert len(server.requests) == 2


def test_what_fails_after_the_final_line_does_not_matter(server: LocalYandexGPT, model: Model, chat: ChatModel) -> None:
    server.next(Stream([line("a", "FINAL")], final=False))
    assert [r.text for r in model.run_stream("hi")] == ["a"]
    server.next(Stream(["data: " + json.dumps({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}) + "\n\n"], final=False))
    assert list(chat.run_stream("hi"))[-1].text == "a"


def test_the_time_of_the_caller_does_not_count(server: LocalYandexGPT, model: Model) -> None:
    server.next(Stream([line("a"), line("ab"), line("abc", "FINAL")]))
    texts = []
    for result in model.run_stream("hi", timeout=0.5):
        texts.append(result.text)
        threading.Event().wait(0.4)
    assert texts[-1] == "abc"


def test_leaving_a_stream_closes_its_connection(server: LocalYandexGPT, model: Model) -> None:
    for leave in ("close", "break", "raise"):
        server.next(Stream([line("a"), 30.0]))
        stream = model.run_stream("hi")
        with contextlib.suppress(KeyError):
            for _ in stream:
                if leave == "raise":
                    raise KeyError
                break
        stream.close()
        assert server.wait_for(lambda s: s.open_connections == 0), leave


# --- Retries and deadlines ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "failure", "sent", "again"), [
    ("run", ConnectionFailed(), True, True), ("run_deferred", ConnectionFailed(), True, False),
    ("run_deferred", ConnectionFailed(), False, True), ("run", ConnectionFailed(retry=False), False, False),
    ("run", ServerError(status_code=502), True, True), ("run", ServerError(status_code=504), True, True),
    ("run", ServerError(status_code=500), True, False), ("run_deferred", ServerError(status_code=502), True, False),
    ("run_deferred", ServerError(status_code=504), True, False), ("run_deferred", ServerError(status_code=503), True, True),
    ("run_deferred", RateLimitError(status_code=429), True, True), ("run", BadRequestError(status_code=400), True, False),
    ("run", InvalidResponse(), True, False), ("run", StreamInterrupted(), True, False), ("run", DeadlineExceeded(), True, False),
    ("TuningService/Tune", ConnectionFailed(), True, False), ("DatasetService/Create", ServerError(status_code=502), True, False),
    ("TextGenerationBatchService/Completion", ConnectionFailed(), True, False), ("upload", ServerError(status_code=502), True, True),
])
def test_what_may_be_sent_again(name: str, failure: Any, sent: bool, again: bool) -> None:
    assert yandex_gpt._retryable(yandex_gpt._CALLS[name], failure, sent) is again


def test_back_off_grows_with_full_jitter(server: LocalYandexGPT, client: ClientConfig, clock: list[float]) -> None:
    server.next(*[Reply(503)] * 5)
    with pytest.raises(ServerError):
        Model("yandexgpt", client=client).run("hi")
    assert clock == [0.5, 1.0, 2.0, 4.0]
    assert len({r.headers["x-client-request-id"] for r in server.requests}) == 1


def test_retry_after_is_honoured_and_one_beyond_the_deadline_fails_at_once(
    server: LocalYandexGPT, model: Model, clock: list[float]
) -> None:
    server.next(Reply(503, retry_after=7))
    model.run("hi")
    assert clock == [7.0]
    server.next(Reply(503, retry_after=30))
    with pytest.raises(ServerError) as caught:
        model.run("hi", timeout=5)
    assert caught.value.retry_after == 30.0
    assert clock == [7.0]


def test_a_429_about_concurrency_is_tried_until_the_deadline(server: LocalYandexGPT, client: ClientConfig) -> None:
    model = Model("yandexgpt", client=patient(client, max_attempts=2, max_backoff=0.01))
    server.next(*[Reply(429, refusal(429, 8, GAUGE))] * 8)
    assert model.run("hi").text
    server.next(*[Reply(429, refusal(429, 8, "requests per second quota limit exceed"))] * 2)
    with pytest.raises(RateLimitError):
        model.run("hi")


def test_at_the_deadline_the_quota_is_what_is_raised(server: LocalYandexGPT, client: ClientConfig) -> None:
    server.next(*[Reply(429, refusal(429, 8, GAUGE))] * 1000)
    started = time.monotonic()
    with pytest.raises(RateLimitError):
        Model("yandexgpt", client=client).run("hi", timeout=0.5)
    assert time.monotonic() - started < 1.5
    server._faults.clear()


def test_max_attempts_1_switches_every_retry_off(server: LocalYandexGPT, client: ClientConfig) -> None:
    model = Model("yandexgpt", client=dataclasses.replace(client, retry=RetryConfig(max_attempts=1)))
    for fault in (Reply(429, refusal(429, 8, GAUGE)), Reply(503), Reset()):
        server.next(fault)
        with pytest.raises((APIError, ConnectionFailed)):
            model.run("hi")
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [Stall(), Trickle(0.05), Stream([line("a"), 30.0])], ids=["says nothing", "trickles", "stalls in mid-body"])
@pytest.mark.parametrize("how", ["run", "stream"])
def test_the_deadline_holds_whatever_the_server_does(server: LocalYandexGPT, model: Model, fault: Any, how: str) -> None:
    server.next(fault)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        model.run("hi", timeout=0.4) if how == "run" else list(model.run_stream("hi", timeout=0.4))
    assert time.monotonic() - started < 1.4
    assert isinstance(caught.value, TimeoutError)
    server.release()


def test_the_deadline_holds_while_a_big_body_is_not_read(model: Model) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        client = dataclasses.replace(model.client, endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(DeadlineExceeded):
            Model("yandexgpt", client=client).run("x" * 20_000_000, timeout=0.3)


def test_a_refused_connection_says_where(client: ClientConfig) -> None:
    nowhere = patient(dataclasses.replace(client, endpoint="http://127.0.0.1:9"))
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1.*refused") as caught:
        Model("yandexgpt", client=nowhere).run("hi")
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.__cause__ is not None


def test_a_place_is_waited_for_within_the_deadline(server: LocalYandexGPT, client: ClientConfig) -> None:
    model = Model("yandexgpt", client=dataclasses.replace(client, max_concurrency=1))
    stream = model.run_stream("hello")
    next(stream)
    with pytest.raises(DeadlineExceeded, match="max_concurrency"):
        model.run("hi", timeout=0.2)
    stream.close()
    assert model.run("hi").text
    equal = Model("yandexgpt", client=dataclasses.replace(client, max_concurrency=1))
    assert yandex_gpt._client(equal.client) is yandex_gpt._client(model.client)


def test_no_redirect_is_followed_and_no_netrc_is_read(
    server: LocalYandexGPT, client: ClientConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.next(Reply(302, headers={"Location": server.url + "/elsewhere"}))
    with pytest.raises(APIError, match="302"):
        Model("yandexgpt", client=client, auth=NoAuth()).run("hi")
    assert len(server.requests) == 1
    assert "authorization" not in server.requests[0].headers


def test_data_logging_can_be_refused(server: LocalYandexGPT, client: ClientConfig) -> None:
    Model("yandexgpt", client=dataclasses.replace(client, data_logging=False)).run("hi")
    assert server.requests[0].headers["x-data-logging-enabled"] == "false"


def test_a_connection_that_went_stale_is_replaced(server: LocalYandexGPT, model: Model) -> None:
    model.run("hi")
    for connection in list(server._live.values()):
        connection.sock.shutdown(socket.SHUT_RDWR)
    assert server.wait_for(lambda s: s.open_connections == 0)
    assert model.run("hi").text
    assert [r.connection for r in server.requests] == [1, 2]


@responses.activate
def test_the_official_hosts_are_the_default() -> None:
    answer = {"result": {"alternatives": [{"message": {"role": "assistant", "text": "hi"}, "status": "ALTERNATIVE_STATUS_FINAL"}]}}
    responses.post("https://llm.api.cloud.yandex.net/foundationModels/v1/completion", json=answer)
    responses.post("https://llm.api.cloud.yandex.net/v1/chat/completions", json={"error": {"message": "no", "type": "x", "code": None}}, status=400)
    responses.get("https://operation.api.cloud.yandex.net/operations/abc", json={"id": "abc", "done": False})
    model = Model("yandexgpt", folder_id="b1g", auth="key")
    assert model.run("hi").text == "hi"
    with pytest.raises(BadRequestError):
        ChatModel("yandexgpt", folder_id="b1g", auth="key").run("hi")
    assert model.attach_deferred("abc").get_status().is_running


# --- run_many -------------------------------------------------------------------------------------


def test_run_many_keeps_the_order_and_reads_no_further_than_needed(model: Model) -> None:
    read = []

    def prompts() -> Iterator[str]:
        for number in range(1000):
            read.append(number)
            yield f"prompt {number}"

    answers = model.run_many(prompts(), workers=3)
    assert [next(answers).text for _ in range(5)] == [f"You said: prompt {n}" for n in range(5)]
    assert len(read) <= 12
    answers.close()


def test_run_many_raises_at_the_place_of_the_failure(server: LocalYandexGPT, model: Model) -> None:
    prompts: list[Any] = ["a", 5, "c"]
    answers = model.run_many(prompts)
    assert next(answers).text == "You said: a"
    with pytest.raises(TypeError, match="messages"):
        next(answers)
    kinds = [type(answer) for answer in model.run_many(prompts, return_errors=True)]
    assert kinds == [Result, TypeError, Result]
    with pytest.raises(TypeError, match="list"):
        model.run_many("one prompt")


# --- Schemas, tools, structured output ------------------------------------------------------------


class Scale(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 5


class Pair(enum.Enum):
    BOTH = b"x"


@dataclasses.dataclass
class Town:
    name: str
    lat: float = 0.0
    tags: list[str] = dataclasses.field(default_factory=list)
    derived: int = dataclasses.field(default=7, init=False)


@dataclasses.dataclass
class Trip:
    """A journey.

    Attributes:
        start: Where it begins.
    """

    start: Town
    stops: list[Town]
    end: Optional[Town] = None  # noqa: UP045 (evaluated on 3.9)
    unit: Scale = Scale.KELVIN


@dataclasses.dataclass
class Node:
    children: list[Node]


class Base(TypedDict):
    id: int


class Row(Base, total=False):
    note: str


try:
    from typing import NotRequired, Required
except ImportError:
    if sys.version_info >= (3, 11):
        from typing import NotRequired, Required
    else:
        Required = NotRequired = None

if NotRequired is not None:

    class Marked(TypedDict):
        id: int
        note: NotRequired[Annotated[str, "What else."]]

    class Loose(TypedDict, total=False):
        id: Required[int]
        note: str


def forecast(
    city: str,
    days: int,
    wind: float,
    night: bool,
    tags: list[str],
    unit: Scale,
    place: Town,
    source: Annotated[Literal["sat", "ground"], "Where from."] = "ground",
):
    """Weather of
    a city.

    It rains.

    Args:
        city: The city,
            in any language.
        days (int, optional): How many (at most): 7.
        night:
            Also at night.

    Returns:
        wind: nothing.
    """
    return f"{city} {days}"


def rest(x: int, y: str = "a", z=None):
    """Does.

    :param int x: The x
        of it.
    :param y: The y.
    """


def test_schema_of_eight_parameters():
    tool = yandex_gpt.FunctionTool.from_function(forecast)
    assert (tool.name, tool.description, tool.strict) == ("forecast", "Weather of a city.", None)
    properties = tool.parameters["properties"]
    assert list(properties) == ["city", "days", "wind", "night", "tags", "unit", "place", "source"]
    assert tool.parameters["required"] == ["city", "days", "wind", "night", "tags", "unit", "place"]
    assert tool.parameters["additionalProperties"] is False
    assert properties["city"] == {"type": "string", "description": "The city, in any language."}
    assert properties["days"] == {"type": "integer", "description": "How many (at most): 7."}
    assert properties["night"] == {"type": "boolean", "description": "Also at night."}
    assert properties["source"] == {
        "enum": ["sat", "ground"],
        "type": "string",
        "description": "Where from.",
        "default": "ground",
    }
    assert properties["place"]["required"] == ["name"]
    assert list(properties["place"]["properties"]) == ["name", "lat", "tags"]


def test_schema_is_valid_json_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = yandex_gpt.FunctionTool.from_function(forecast).parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {
        "city": "Омск",
        "days": 5.0,
        "wind": 1,
        "night": False,
        "tags": [],
        "unit": "C",
        "place": {"name": "x"},
    }
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "unit": "F"}, schema)
    for hint in (
        Trip,
        Row,
        Optional[tuple[int, str]],
        dict[str, Level],
        Any,
        Union[int, list[Any]],
    ):
        jsonschema.Draft202012Validator.check_schema(yandex_gpt._schema(hint, "x"))


def test_schema_fits_the_services_protobuf():
    pytest.importorskip("yandexcloud")
    from google.protobuf.json_format import ParseDict
    from yandex.cloud.ai.foundation_models.v1.text_generation.text_generation_service_pb2 import (
        CompletionRequest,
    )

    tool = yandex_gpt.FunctionTool.from_function(forecast)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    body = {
        "modelUri": "gpt://f/m",
        "tools": [{"function": function}],
        "jsonSchema": {"schema": yandex_gpt._format_schema(Trip)[1]},
    }
    assert ParseDict(body, CompletionRequest()).tools[0].function.name == "forecast"


def test_descriptions_from_rest_docstring():
    tool = yandex_gpt.FunctionTool.from_function(rest)
    assert tool.description == "Does."
    assert tool.parameters["properties"] == {
        "x": {"type": "integer", "description": "The x of it."},
        "y": {"type": "string", "description": "The y.", "default": "a"},
        "z": {"default": None},
    }


@pytest.mark.parametrize(
    "hint, schema",
    [
        (Any, {}),
        (type(None), {"type": "null"}),
        (list, {"type": "array", "items": {}}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (
            tuple[int, str],
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "minItems": 2,
                "maxItems": 2,
            },
        ),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (dict, {"type": "object", "additionalProperties": {}}),
        (Scale, {"enum": ["C", "K"], "type": "string"}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (Literal[Scale.KELVIN], {"enum": ["K"], "type": "string"}),
        (Optional[str], {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (
            Annotated[Optional[bool], "Sure?"],
            {"anyOf": [{"type": "boolean"}, {"type": "null"}], "description": "Sure?"},
        ),
        (
            Row,
            {
                "type": "object",
                "properties": {"id": {"type": "integer"}, "note": {"type": "string"}},
                "required": ["id"],
                "additionalProperties": False,
            },
        ),
    ],
)
def test_schema(hint, schema):
    assert yandex_gpt._schema(hint, "x") == schema


@pytest.mark.skipif(NotRequired is None, reason="needs Python 3.11 or typing_extensions")
def test_typed_dict_marks_win_over_total():
    assert yandex_gpt._schema(Marked, "x")["required"] == ["id"]
    assert yandex_gpt._schema(Marked, "x")["properties"]["note"] == {
        "type": "string",
        "description": "What else.",
    }
    assert yandex_gpt._schema(Loose, "x")["required"] == ["id"]
    assert yandex_gpt._convert({"id": 1.0}, Marked, "x") == {"id": 1}


def positional(a, b, /): ...
def starred(*things): ...
def keywords(**things): ...
def unknown(a: Missing): ...  # noqa: F821
def byte(a: bytes): ...
def nested(a: list[dict[int, str]]): ...
def called(a: Callable[[int], str]): ...
def pair(a: Pair): ...
def listed(a: [int]): ...
def endless(a: Node): ...


@pytest.mark.parametrize(
    "function, said",
    [
        (positional, "positional.a: a positional-only"),
        (starred, "starred.things: a variadic positional"),
        (keywords, "keywords.things: a variadic keyword"),
        (unknown, "'a': 'Missing'"),
        (byte, "byte.a: .*bytes"),
        (nested, "nested.a: .*dict"),
        (called, "called.a: "),
        (pair, "pair.a: .*bytes"),
        (listed, r"listed.a: |listed: .*'a'"),
        (endless, "endless.a.children.children.*deep"),
        (Town, "plain function"),
        ("forecast", "plain function"),
    ],
)
def test_what_cannot_be_a_tool_is_named(function, said):
    with pytest.raises(TypeError, match=said):
        yandex_gpt._as_tools([function])


def test_async_function_is_refused():
    async def later(a: int): ...

    with pytest.raises(TypeError, match="later"):
        yandex_gpt._as_tool(later)


@pytest.mark.skipif(sys.version_info >= (3, 10), reason="X | Y is evaluated")
def test_new_union_on_old_python_names_the_parameter():
    def f(a: int | None): ...

    with pytest.raises(TypeError, match=r"'a': 'int \| None'"):
        yandex_gpt._as_tool(f)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="X | Y")
def test_new_union():
    def f(a: int | None = None): ...

    schema = yandex_gpt._as_tool(f).parameters["properties"]["a"]
    assert schema == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert yandex_gpt._arguments(f, {"a": 5.0}) == {"a": 5}


TRIP = {
    "start": {"name": "A"},
    "stops": [{"name": "B", "lat": 1, "tags": ["x"]}],
    "end": None,
    "unit": "C",
}


@pytest.mark.parametrize(
    "value, hint, result",
    [
        (5.0, int, 5),
        (5, float, 5.0),
        (2**60 + 1, float, 2.0**60),
        (5.0, NewType("Days", int), 5),
        (5, int, 5),
        (None, type(None), None),
        (5.0, Level, Level.HIGH),
        ("K", Scale, Scale.KELVIN),
        (5.0, Literal["a", 5], 5),
        (5.0, Optional[int], 5),
        (5.0, Union[int, float], 5.0),
        (5, Union[float, int], 5),
        (None, Optional[int], None),
        ("a", Union[int, str], "a"),
        ({"name": "A"}, Union[Base, Town], Town("A")),
        ([1.0, 2], tuple[int, ...], (1, 2)),
        ([1.0, "a"], tuple[int, str], (1, "a")),
        ([], list, []),
        ({"a": 1}, dict, {"a": 1}),
        ({"a": 1.0}, dict[str, int], {"a": 1}),
        ({"id": 1.0}, Row, {"id": 1}),
        ([1.5, None], list[Any], [1.5, None]),
        (True, Annotated[bool, "x"], True),
        (TRIP, Trip, Trip(Town("A"), [Town("B", 1.0, ["x"])], None, Scale.CELSIUS)),
    ],
)
def test_convert(value, hint, result):
    converted = yandex_gpt._convert(value, hint, "x")
    assert converted == result
    assert type(converted) is type(result)


@pytest.mark.parametrize(
    "value, hint, said",
    [
        (5.5, int, "x: expected integer, got 5.5"),
        (True, int, "x: expected integer, got True"),
        (1, bool, "x: expected boolean"),
        (True, float, "x: expected number"),
        (float("inf"), int, "x: expected integer, got inf"),
        ("5", int, "x: expected integer"),
        (5, str, "x: expected string"),
        ("F", Scale, r"x: expected one of \['C', 'K'\], got 'F'"),
        (True, Literal[1], "x: expected one of"),
        ("a", Optional[int], "x: expected integer, got 'a'"),
        ([1], tuple[int, str], "x: expected fixed array"),
        ([1, "b"], list[int], r"x\[1\]: expected integer"),
        ("ab", list[str], "x: expected array"),
        ({"a": "b"}, dict[str, int], "x.a: expected integer"),
        ({"id": 1, "nope": 2}, Row, "x.nope: unknown"),
        ({}, Town, "x.name: missing"),
        (5, Town, "x: expected fixed object, got 5"),
        (
            {**TRIP, "stops": [{"name": "B", "lat": "far"}]},
            Trip,
            r"x.stops\[0\].lat: expected number",
        ),
    ],
)
def test_convert_refuses(value, hint, said):
    with pytest.raises(ValueError, match=said):
        yandex_gpt._convert(value, hint, "x")


def test_arguments_reach_the_function():
    given = {
        "city": "Ош",
        "days": 5.0,
        "wind": 3,
        "night": False,
        "tags": [],
        "unit": "C",
        "place": {"name": "p"},
    }
    arguments = yandex_gpt._arguments(forecast, given)
    assert forecast(**arguments) == "Ош 5"
    assert (arguments["unit"], arguments["place"]) == (Scale.CELSIUS, Town("p"))


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "^x: missing"),
        ({"x": 1, "w": 2}, "^w: unknown; .*x, y, z"),
        ({"x": 1.5}, "^x: expected integer"),
    ],
)
def test_arguments_say_what_is_wrong(given, said):
    with pytest.raises(ValueError, match=said):
        yandex_gpt._arguments(rest, given)


class Station:
    def report(self, place: Town) -> str:
        """Reports."""
        return place.name


def test_bound_method_is_a_tool():
    tool = yandex_gpt._as_tool(Station().report)
    assert tool.parameters["required"] == ["place"]
    assert yandex_gpt._arguments(tool._function, {"place": {"name": "A"}}) == {"place": Town("A")}


def test_tool_is_a_value():
    tool = yandex_gpt.FunctionTool.from_function(rest)
    assert tool == yandex_gpt.FunctionTool(tool.name, tool.description, copy.deepcopy(tool.parameters))
    assert hash(tool) == hash(dataclasses.replace(tool))
    assert tool != dataclasses.replace(tool, strict=True)
    assert (
        repr(yandex_gpt.FunctionTool("f", "d", {}))
        == "FunctionTool(name='f', description='d', parameters={}, strict=None)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        tool.name = "g"
    again = pickle.loads(pickle.dumps(tool))
    assert again == tool
    assert again._function is rest
    assert copy.copy(tool) == tool


def test_lambda_is_a_tool_that_cannot_be_pickled():
    tool = yandex_gpt._as_tool(lambda x: x)
    assert tool.name == "lambda"
    with pytest.raises(pickle.PicklingError, match=r"'lambda'.*top level"):
        pickle.dumps(tool)


def test_as_tools():
    tool = yandex_gpt._as_tool(rest)
    assert yandex_gpt._as_tools(rest) == yandex_gpt._as_tools([tool]) == (tool,)
    assert [tool.name for tool in yandex_gpt._as_tools(iter([rest, forecast]))] == ["rest", "forecast"]
    with pytest.raises(ValueError, match="rest, rest"):
        yandex_gpt._as_tools([rest, tool])


@pytest.mark.parametrize(
    "value, neutral",
    [
        ("none", ("mode", "NONE")),
        ("Auto", ("mode", "AUTO")),
        ("REQUIRED", ("mode", "REQUIRED")),
        ({"type": "function", "function": {"name": "f"}}, ("function", "f")),
        (rest, ("function", "rest")),
        (yandex_gpt.FunctionTool("g", "", {}), ("function", "g")),
    ],
)
def test_tool_choice(value, neutral):
    assert yandex_gpt._tool_choice(value) == neutral


@pytest.mark.parametrize(
    "value", ["any", "", {}, {"function": "f"}, {"function": {"name": 5}}, 5, None, ["auto"]]
)
def test_tool_choice_refuses(value):
    with pytest.raises((TypeError, ValueError), match="tool_choice takes"):
        yandex_gpt._tool_choice(value)


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    "value, expected",
    [
        ("json", (None, None, None)),
        ({"json_schema": SCHEMA}, (None, SCHEMA, None)),
        ({"jsonschema": SCHEMA, "name": "n", "strict": False}, ("n", SCHEMA, False)),
        ({"schema": SCHEMA}, (None, SCHEMA, None)),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            ("n", SCHEMA, None),
        ),
        (Row, ("Row", yandex_gpt._schema(Row, "Row"), True)),
        (Town, ("Town", yandex_gpt._schema(Town, "Town"), True)),
    ],
)
def test_format_schema(value, expected):
    assert yandex_gpt._format_schema(value) == expected


@pytest.mark.parametrize(
    "value, error",
    [
        ("xml", ValueError),
        ({"type": "object"}, ValueError),
        ({"json_schema": "{}"}, ValueError),
        ({"type": "json_schema"}, ValueError),
        (5, TypeError),
        (int, TypeError),
        (Scale, TypeError),
        (Town("A"), TypeError),
        (rest, TypeError),
    ],
)
def test_format_schema_refuses(value, error):
    with pytest.raises(error, match="response_format takes"):
        yandex_gpt._format_schema(value)


def test_format_schema_must_be_json():
    with pytest.raises(TypeError, match="not JSON serializable"):
        yandex_gpt._format_schema({"json_schema": {"enum": {1, 2}}})


@pytest.mark.parametrize(
    "text, form, result",
    [
        (' {"a": 1}\n', "json", {"a": 1}),
        ("[1]", {"json_schema": SCHEMA}, [1]),
        ("5", None, 5),
        ('```json\n{"name": "A"}\n```\n', Town, Town("A")),
        ('```\n{"id": 1.0}```', Row, {"id": 1}),
        (json.dumps(TRIP), Trip, yandex_gpt._convert(TRIP, Trip, "")),
    ],
)
def test_parse(text, form, result):
    assert yandex_gpt._parse(text, form) == result


@pytest.mark.parametrize(
    "text, form",
    [
        pytest.param("Sorry, no.", "json", id="prose"),
        pytest.param('{"name": "A"', Town, id="cut"),
        pytest.param('{"nom": "A"}', Town, id="other field"),
        pytest.param("[" * 100_000, "json", id="too deep"),
        pytest.param('{"id": 1e999}', Row, id="infinite"),
        pytest.param("", "json", id="empty"),
    ],
)
def test_parse_shows_what_is_no_such_format(text, form):
    with pytest.raises(ValueError) as error:
        yandex_gpt._parse(text, form)
    assert text[:200] in str(error.value)
    assert text[:201] not in str(error.value) or len(text) <= 200


def test_pydantic_types():
    pydantic = pytest.importorskip("pydantic")

    class Address(pydantic.BaseModel):
        street: str

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(description="Whose.")
        home: Optional[Address] = None  # noqa: UP045

    @pydantic.dataclasses.dataclass
    class Point:
        x: int

    Person.model_rebuild(_types_namespace={"Address": Address, "Optional": Optional})
    assert yandex_gpt._format_schema(Person) == ("Person", Person.model_json_schema(), True)
    assert yandex_gpt._parse('{"name": "A", "home": {"street": "B"}}', Person).home == Address(street="B")
    assert yandex_gpt._parse('{"x": 5.0}', Point) == Point(5)
    assert yandex_gpt._format_schema(Point)[1]["properties"]["x"]["type"] == "integer"
    with pytest.raises(ValueError, match=r"home\.street"):
        yandex_gpt._parse('{"name": "A", "home": {}}', Person)

    def move(who, to): ...

    move.__annotations__ = {"who": Person, "to": list[Point]}
    schema = yandex_gpt._as_tool(move).parameters
    assert list(schema["$defs"]) == ["Address"]
    assert "$defs" not in schema["properties"]["who"]
    assert yandex_gpt._arguments(move, {"who": {"name": "A"}, "to": [{"x": 1}]})["to"] == [Point(1)]


def test_pydantic_is_not_imported():
    import subprocess

    code = "import sys, yandex_gpt; yandex_gpt._schema(dict, 'x'); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Tools over the wire --------------------------------------------------------------------------


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(city: str, days: int = 1, unit: Unit = Unit.C) -> dict[str, Any]:
    """The weather forecast.

    Args:
        city: where
    """
    return {"city": city, "days": days, "unit": unit.value}


def failing(city: str) -> str:
    "Always fails."
    raise KeyError(city)


@pytest.mark.parametrize("kind", [Model, ChatModel])
def test_run_tools_calls_python_and_answers(server: LocalYandexGPT, client: ClientConfig, kind: Any) -> None:
    model = kind("yandexgpt", client=client).configure(tools=weather, temperature=0.1)
    result = model.run_tools("weather in Omsk and Tomsk for 5 days")
    assert '"city": "Omsk"' in result.text
    assert '"city": "Tomsk"' in result.text
    assert '"days": 5' in result.text  # the wire had 5.0
    assert len(server.requests) == 2
    again = model.run([*result.messages, "thanks"])
    assert again.text or again.tool_calls


@pytest.mark.parametrize("kind", [Model, ChatModel])
def test_what_goes_wrong_in_a_call_is_told_to_the_model(server: LocalYandexGPT, client: ClientConfig, kind: Any) -> None:
    result = kind("yandexgpt", client=client).configure(tools=[failing]).run_tools("failing in Omsk")
    assert "KeyError" in result.text


@pytest.mark.parametrize("kind", [Model, ChatModel])
def test_the_tool_loop_ends_and_keeps_the_conversation(client: ClientConfig, kind: Any, server: LocalYandexGPT) -> None:
    native = {"toolCallList": {"toolCalls": [{"functionCall": {"name": "weather", "arguments": {"city": "Omsk"}}}]}}
    openai = {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "weather", "arguments": '{"city": "Omsk"}'}}]}
    server.answer = lambda body: {"role": "assistant", **(native if "modelUri" in body else openai)}
    model = kind("yandexgpt", client=client).configure(tools=weather)
    with pytest.raises(ToolLoopError) as caught:
        model.run_tools("hi", max_rounds=2)
    assert caught.value.partial.tool_calls[0].name == "weather"
    assert len(caught.value.messages) == 5


def test_a_forced_choice_holds_for_the_first_round(server: LocalYandexGPT, client: ClientConfig) -> None:
    model = Model("yandexgpt", client=client).configure(tools=weather, tool_choice=weather)
    assert "The tools say" in model.run_tools("in Omsk").text
    assert [("toolChoice" in r.json) for r in server.requests] == [True, False]


@dataclasses.dataclass(frozen=True)
class City:
    name: str
    population: int = 0


@pytest.mark.parametrize("kind", [Model, ChatModel])
def test_a_dataclass_is_filled_from_a_text(client: ClientConfig, kind: Any) -> None:
    result = kind("yandexgpt", client=client).configure(response_format=City).run("Is it true that Omsk has 1100000 people?")
    assert result.parse() == City("Omsk", 1100000)


def test_a_broken_format_is_a_value_error_with_the_text(server: LocalYandexGPT, model: Model) -> None:
    server.answer = lambda body: "Sorry, no JSON today"
    with pytest.raises(ValueError, match="Sorry"):
        model.configure(response_format=City).run("Omsk").parse()


# --- ChatModel ------------------------------------------------------------------------------------


def sse(*events: Any) -> list[str]:
    return [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]


def delta(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": {**({"content": content} if content is not None else {}), **more},
                                       "finish_reason": finish}]}


def test_chat_requests_are_openai_s(server: LocalYandexGPT, chat: ChatModel) -> None:
    model = chat.configure(temperature=0.2, max_tokens=50, reasoning_mode="LOW", extra_query={"top_p": 0.5, "seed": 1})
    result = model.run([{"role": "system", "text": "s"}, "hello"])
    body = server.requests[0].json
    assert body == {
        "model": "gpt://b1gtest/gpt-oss-120b/latest", "stream": False, "temperature": 0.2, "max_tokens": 50, "top_p": 0.5,
        "seed": 1, "reasoning_effort": "low",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]}
    assert server.requests[0].headers["openai-project"] == "b1gtest"
    assert result.reasoning_text
    assert result.usage


def test_chat_streams_as_the_real_models_send_them(server: LocalYandexGPT, chat: ChatModel) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "wea", "arguments": ""}}
    server.next(Stream([
        ": keep-alive\r\n\r\n", *sse(delta(role="assistant"), delta("")), "data: " + json.dumps(delta("П")) + "\r\n\r\n",
        *sse(delta(reasoning_content="hm"), delta("ри"), {"choices": []}, delta(tool_calls=[call]),
             delta(tool_calls=[{"index": 0, "id": "", "type": "", "function": {"name": "ther", "arguments": '{"ci'}}]),
             delta(tool_calls=[{"index": 0, "function": {"name": "", "arguments": 'ty": "Omsk"}'}}]),
             delta("", "tool_calls"), {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
             "[DONE]")]))
    results = list(chat.run_stream("hi"))
    assert [r.delta for r in results] == ["П", "", "ри", ""]
    last = results[-1]
    assert (last.text, last.reasoning_text, last.status) == ("При", "hm", Status.TOOL_CALLS)
    assert last.tool_calls == (ToolCall("weather", {"city": "Omsk"}, "c1"),)
    assert last.usage == Usage(1, 2, 3)
    assert [r.tool_calls for r in results[:-1]] == [None] * 3


@pytest.mark.parametrize(("pieces", "error"), [
    (sse(delta("a")), StreamInterrupted), (sse(delta("a"), "[DONE]"), StreamInterrupted),
    (sse(delta("a"), {"error": {"message": "slow down", "code": 429}}), RateLimitError),
    ([*sse(delta("a")), '{"error": {"message": "boom", "code": 500}}\n'], ServerError),
    (sse(delta("a"), "{broken"), InvalidResponse), ([*sse(delta("a")), 'data: {"choi'], StreamInterrupted),
])
def test_a_chat_stream_that_fails_keeps_what_came(server: LocalYandexGPT, chat: ChatModel, pieces: Any, error: Any) -> None:
    server.next(Stream(pieces))
    with pytest.raises(error) as caught:
        list(chat.run_stream("hi"))
    assert caught.value.partial.text == "a"


def test_a_finish_reason_without_done_is_an_end(server: LocalYandexGPT, chat: ChatModel) -> None:
    server.next(Stream(sse(delta("a"), delta("b", "length"))))
    results = list(chat.run_stream("hi"))
    assert (results[-1].text, results[-1].status, results[-1].usage) == ("ab", Status.TRUNCATED_FINAL, None)
    assert "".join(r.delta for r in results) == "ab"


def test_results_of_two_calls_to_one_function_find_their_calls(chat: ChatModel) -> None:
    calls = (ToolCall("f", {"a": 1}, "x"), ToolCall("g", {}, "y"), ToolCall("f", {"a": 2}, "z"))
    answer = Alternative("assistant", "", Status.TOOL_CALLS, calls)
    results = [{"name": "f", "content": "1"}, {"name": "f", "content": "2"}, {"name": "g", "content": "3"}]
    sent = chat._encode(yandex_gpt._normalize(["q", answer, {"tool_results": results}]), stream=False)["messages"]
    assert [(m["tool_call_id"], m["content"]) for m in sent[2:]] == [("x", "1"), ("z", "2"), ("y", "3")]
    sent = chat._encode(yandex_gpt._normalize(["q", answer, {"tool_call_id": "x", "content": "1"}]), stream=False)["messages"]
    assert sent[-1] == {"role": "tool", "tool_call_id": "x", "content": "1"}
    with pytest.raises(ConfigError, match=r"messages\[1\].*'h'"):
        chat.run(["q", {"tool_results": [{"name": "h", "content": ""}]}])


def test_an_image_becomes_a_data_url(server: LocalYandexGPT, chat: ChatModel, tmp_path: Any) -> None:
    png = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
    (tmp_path / "dot.png").write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    for part in (png, tmp_path / "dot.png", {"type": "image_url", "image_url": {"url": png}}):
        chat.run({"role": "user", "content": ["what is it?", part]})
        assert server.requests[-1].json["messages"][0]["content"] == [
            {"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]


def test_models_are_listed(server: LocalYandexGPT, client: ClientConfig) -> None:
    models = ChatModel.list(client=client)
    assert all(model.uri.startswith("gpt://") for model in models)
    assert models[0].run("hello").text
    with pytest.raises(ConfigError, match="name"):
        models[0].configure(response_format={"json_schema": {"type": "object"}}).run("x")


def test_openai_s_own_client_gets_the_same_answers(server: LocalYandexGPT, chat: ChatModel) -> None:
    openai = pytest.importorskip("openai")
    theirs = openai.OpenAI(api_key=KEY, base_url=server.url + "/v1", project="b1gtest", max_retries=0)
    ask: dict[str, Any] = {"model": chat.uri, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    plain = theirs.chat.completions.create(**ask)
    ours = chat.run("Why is the sky blue?")
    assert plain.choices[0].message.content == ours.text
    assert plain.usage.total_tokens == ours.usage.total_tokens
    text = "".join(c.choices[0].delta.content or "" for c in theirs.chat.completions.create(stream=True, **ask) if c.choices)
    assert text == list(chat.run_stream("Why is the sky blue?"))[-1].text
    tool = FunctionTool.from_function(weather)
    spec = {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}}
    ask["messages"] = [{"role": "user", "content": "weather in Omsk and Tomsk"}]
    called = theirs.chat.completions.create(tools=[spec], **ask).choices[0].message.tool_calls
    mine = chat.configure(tools=weather).run("weather in Omsk and Tomsk").tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in called] == [(c.name, c.arguments) for c in mine]
    streamed = list(chat.configure(tools=weather).run_stream("weather in Omsk and Tomsk"))[-1].tool_calls
    assert [(c.name, c.arguments) for c in streamed] == [(c.name, c.arguments) for c in mine]


def test_an_openai_compatible_server_that_is_not_ours_answers(client: ClientConfig, tmp_path: Any) -> None:
    pytest.importorskip("fakellm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "fakellm.yaml").write_text(textwrap.dedent("""
        version: 1
        rules:
          - {name: greeting, when: {messages_contain: hello}, respond: {content: "Hi there, from a stranger"}}
    """))
    command = [sys.executable, "-c", "from fakellm.cli import main; main()", "serve", "--port", str(port)]
    stranger = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        chat = ChatModel("gpt-oss-120b", client=patient(
            dataclasses.replace(client, endpoint=f"http://127.0.0.1:{port}"), max_attempts=1000, max_backoff=0.1))
        plain = chat.run("hello", timeout=30)  # the retries wait until it listens
        assert (plain.text, plain.status) == ("Hi there, from a stranger", Status.FINAL)
        assert plain.usage
        streamed = list(chat.run_stream("hello"))
        assert "".join(r.delta for r in streamed) == streamed[-1].text == plain.text
        assert streamed[-1].status is Status.FINAL
    finally:
        stranger.terminate()
        stranger.wait()


# --- Operations -----------------------------------------------------------------------------------


def test_a_deferred_run_is_submitted_here_and_collected_there(server: LocalYandexGPT, model: Model) -> None:
    operation = model.run_deferred("hello")
    sent = server.requests[-1].headers
    assert uuid.UUID(sent["idempotency-key"]).version == 4
    there = pickle.loads(pickle.dumps(model.attach_deferred(operation.id)))
    seen: list[Any] = []
    assert there.wait(poll_interval=0.01, on_status=seen.append).text == "Hello! How can I help you?"
    assert [s.status_name for s in seen] == ["running"] * server.polls + ["succeeded"]
    assert operation.get_result() == there.get_result()


def test_a_submission_goes_out_on_a_fresh_connection(server: LocalYandexGPT, model: Model) -> None:
    model.run("hi")
    model.run_deferred("hi")
    model.run("hi")
    assert server.requests[0].connection != server.requests[1].connection


@pytest.mark.parametrize(("fault", "requests_", "says"), [
    (Reset(), 1, "may have taken"), (Reply(502), 1, "may have taken"), (Reply(400), 1, "did not take"),
    (Reply(200, "nonsense"), 1, "may have taken"), (Reply(200, {"id": "../x"}), 1, "may have taken"),
])
def test_a_submission_is_not_sent_again_when_it_may_have_been_taken(
    server: LocalYandexGPT, client: ClientConfig, fault: Any, requests_: int, says: str
) -> None:
    server.next(fault)
    with pytest.raises(YandexGPTError, match=says) as caught:
        Model("yandexgpt", client=patient(client)).run_deferred("hi")
    assert len(server.requests) == requests_
    assert caught.value.idempotency_key == server.requests[0].headers["idempotency-key"]


@pytest.mark.parametrize("fault", [Reply(503), Reply(429, refusal(429, 8, GAUGE))], ids=repr)
def test_a_refused_submission_is_sent_again_with_its_key(server: LocalYandexGPT, client: ClientConfig, fault: Any) -> None:
    server.next(fault)
    Model("yandexgpt", client=patient(client)).run_deferred("hi")
    assert len({r.headers["idempotency-key"] for r in server.requests}) == 1
    assert len(server.requests) == 2


def test_wait_survives_what_passes(server: LocalYandexGPT, client: ClientConfig) -> None:
    operation = Model("yandexgpt", client=patient(client, max_attempts=1)).run_deferred("hello")
    server.next(Reply(503), Reset(), Stall(0.3), Reply(200, "nonsense"), path="/operations/")
    assert operation.wait(timeout=0.2, poll_interval=0.01).text


def test_get_result_tells_how_an_operation_stands(server: LocalYandexGPT, model: Model) -> None:
    operation = model.run_deferred("hello")
    with pytest.raises(OperationNotReady) as early:
        operation.get_result()
    assert early.value.operation_id == operation.id
    server.next(Reply(200, {"id": operation.id, "done": True}))
    with pytest.raises(OperationError):
        operation.get_result()
    operation.cancel()
    with pytest.raises(OperationError) as cancelled:
        operation.wait(poll_interval=0.01)
    assert (cancelled.value.code, cancelled.value.operation_id) == ("CANCELLED", operation.id)
    server.next(Fail(13, "the model is ill"))
    with pytest.raises(OperationError, match="the model is ill") as failed:
        model.run_deferred("hello").wait(poll_interval=0.01)
    assert failed.value.code == "INTERNAL"
    server.forget(operation.id)
    with pytest.raises(NotFoundError, match="three days"):
        operation.get_status()


def test_poll_timeout_carries_the_operation(server: LocalYandexGPT, model: Model) -> None:
    server.polls = 10**6
    operation = model.run_deferred("hello")
    with pytest.raises(PollTimeout) as caught:
        operation.wait(poll_timeout=0.1, poll_interval=0.02)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.operation_id == operation.id
    server.operations[operation.id]["_left"] = 0
    assert pickle.loads(pickle.dumps(caught.value)).operation.wait().text


def test_polls_grow_by_half_to_ten_seconds(server: LocalYandexGPT, model: Model, clock: list[float]) -> None:
    server.polls = 12
    model.run_deferred("hello").wait()
    assert clock[:4] == [0.5, 0.75, 1.125, 1.6875]
    assert max(clock) == 10


def test_ctrl_c_in_wait_says_how_to_go_on(
    server: LocalYandexGPT, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operation = model.run_deferred("hello")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(yandex_gpt.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        operation.wait()
    assert f"attach_deferred({operation.id!r})" in caplog.text
    assert not server.operations[operation.id].get("cancelled")


# --- Processes and threads ------------------------------------------------------------------------


def ask(model: Any) -> str:
    return str(model.run("hello"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_model_works_in_other_processes(server: LocalYandexGPT, model: Model, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    model.run("hello")  # the parent has a connection, which a child must not share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(ask, [model] * 4) == [ask(model)] * 4


def test_a_fork_renews_the_locks(server: LocalYandexGPT, client: ClientConfig) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("not on this system")
    model = Model("yandexgpt", client=dataclasses.replace(client, max_concurrency=1))
    stream = model.run_stream("hello")
    next(stream)  # holds the only place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os._exit(0 if model.run("hello", timeout=5).text else 1)
    assert os.waitpid(child, 0)[1] == 0
    stream.close()


def test_64_threads_share_one_pool(server: LocalYandexGPT, model: Model) -> None:
    answers = list(model.run_many([f"prompt {n}" for n in range(128)], workers=64))
    assert [a.text for a in answers] == [f"You said: prompt {n}" for n in range(128)]


# --- Command line ---------------------------------------------------------------------------------


@pytest.fixture
def shell(server: LocalYandexGPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    "Runs the command: (exit status, stdout, stderr)."
    monkeypatch.setenv("YANDEX_GPT_ENDPOINT", server.url)

    def run(*argv: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = yandex_gpt.main(list(argv))
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


SKY = "The sky is blue because air scatters the short waves of sunlight more than the long ones (Rayleigh scattering).\n"


@pytest.mark.parametrize(("argv", "stdin", "out"), [
    (["Why is the sky blue?"], "", SKY), (["run", "Why is the sky blue?"], "", SKY), ([], "Why is the sky blue?", SKY),
    (["-"], "Why is the sky blue?", SKY), (["--openai", "--no-stream", "Why is the sky blue?"], "", SKY),
    (["Summarise this"], "one two three", "Summary: one two three\n"),
    (["--max-tokens", "2", "hello"], "", "Hello!\n"),
    (["tokenize", "hello"], "", "4\n"), (["chat"], "hello\nmore\n", "Hello! How can I help you?\nYou said: more (after 1 earlier turns)\n"),
])
def test_the_command_answers(shell: Any, argv: list[str], stdin: str, out: str) -> None:
    assert shell(*argv, stdin=stdin) == (0, out, "")


def test_the_command_prints_json(shell: Any, tmp_path: Any) -> None:
    assert json.loads(shell("--json", "hello")[1])["alternatives"][0]["text"].startswith("Hello")
    schema = tmp_path / "city.json"
    schema.write_text('{"type": "object", "properties": {"name": {"type": "string"}}}')
    for more in ([], ["--openai"]):
        assert json.loads(shell("--schema", str(schema), *more, "I live in Omsk")[1]) == {"name": "Omsk"}
    assert json.loads(shell("tokenize", "--json", "hello")[1])[0]["special"] in (True, False)
    assert "gpt://" in shell("models")[1]


def test_the_command_submits_and_collects(server: LocalYandexGPT, shell: Any) -> None:
    status, out, err = shell("submit", "hello")
    assert (status, err, len(out.split())) == (0, "", 1)
    assert shell("operation", out.strip())[1] == "running\n"
    server.polls = 0
    assert shell("operation", out.strip(), "--wait")[1] == "Hello! How can I help you?\n"
    server.polls = 10**6
    running = shell("submit", "hello")[1].strip()
    assert json.loads(shell("operation", running, "--json")[1])["status"] == "running"
    assert shell("operation", running, "--cancel") == (0, "cancelled\n", "")
    assert "CANCELLED" in shell("operation", running)[2]


def test_ctrl_c_at_a_terminal_says_how_to_take_the_operation_up(server: LocalYandexGPT) -> None:
    server.polls = 10**6
    environment = {**os.environ, "YANDEX_GPT_ENDPOINT": server.url}
    command = [sys.executable, yandex_gpt.__file__]
    submit = subprocess.run([*command, "submit", "hi"], stdin=subprocess.DEVNULL, env=environment, capture_output=True, text=True, check=True)
    waiting = subprocess.Popen([*command, "operation", submit.stdout.strip(), "--wait"], stdin=subprocess.DEVNULL,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.wait_for(lambda s: len(s.requests) >= 3, timeout=20)
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=20)
    assert (waiting.returncode, out) == (130, "")
    assert f"yandex-gpt operation {submit.stdout.strip()} --wait" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("argv", "status", "words"), [
    (["--temperature", "7", "hello"], 1, "temperature"), (["--temperature", "hot", "x"], 2, "invalid float"),
    (["operation", "nope:1"], 1, "tune:ID"), (["operation", "abc"], 1, "404"), (["--schema", "no.json", "x"], 1, "no.json"),
    ([""], 1, "prompt"), (["--model", "gpt-9", "x"], 1, "gpt-9"),
])
def test_errors_are_one_line_on_stderr(shell: Any, argv: list[str], status: int, words: str) -> None:
    code, out, err = shell(*argv)
    assert (code, out) == (status, "")
    assert words in err
    assert status == 2 or err.count("\n") == 1


def test_ctrl_c_is_130(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "run_stream", interrupt)
    assert shell("hello")[0] == 130


def test_without_credentials_the_command_says_what_it_looked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("YC_FOLDER_ID", "b1g")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert yandex_gpt.main(["hello"]) == 1
    assert "YC_API_KEY" in capsys.readouterr().err
    monkeypatch.delenv("YC_FOLDER_ID")
    assert yandex_gpt.main(["hello"]) == 1
    assert "YC_FOLDER_ID" in capsys.readouterr().err


# --- Datasets, tuning, batches --------------------------------------------------------------------

ROWS = [{"request": [{"role": "user", "text": f"q{n}"}], "response": f"a{n}"} for n in range(5)]


@pytest.fixture
def rows_file(tmp_path: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def test_a_file_becomes_a_dataset(server: LocalYandexGPT, client: ClientConfig, rows_file: Any, tmp_path: Any) -> None:
    seen: list[Any] = []
    dataset = Dataset.upload(rows_file, client=client, labels={"a": "b"}, description="d", on_status=seen.append)
    assert (dataset.status, dataset.rows_count, dataset.name, dataset.labels) == ("READY", 5, "rows", {"a": "b"})
    assert seen[-1].progress == 1.0
    put = next(r for r in server.requests if r.method == "PUT")
    assert "authorization" not in put.headers
    assert "x-folder-id" not in put.headers
    assert put.headers["content-length"] == str(rows_file.stat().st_size)
    assert Dataset.get(dataset.id, client=client) == dataset
    assert Dataset.list(client=client, name="rows", status="ready") == (dataset,)
    assert list(dataset.rows()) == ROWS
    assert [path.read_bytes() for path in dataset.download(tmp_path)] == [rows_file.read_bytes()]
    assert dataset.download(tmp_path / "one.jsonl") == (tmp_path / "one.jsonl",)
    dataset.delete()
    with pytest.raises(NotFoundError):
        Dataset.get(dataset.id, client=client)


def test_rows_of_parquet_take_pyarrow_and_download_does_not(client: ClientConfig, tmp_path: Any, monkeypatch: Any) -> None:
    pytest.importorskip("pyarrow")
    with LocalYandexGPT(parquet=True) as server:
        config = dataclasses.replace(client, endpoint=server.url)
        dataset = Dataset.upload(ROWS, client=config)
        assert [row["response"] for row in dataset.rows()] == [row["response"] for row in ROWS]
        (path,) = dataset.download(tmp_path)
        assert path.read_bytes()[:4] == b"PAR1"
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ImportError, match="Dataset.download"):
            list(dataset.rows())


@pytest.mark.parametrize(("content", "says"), [
    (b"", "empty"), (b"\n\n", "empty"), (b'{"a": 1}\nnot json\n', "line 2"), (b'{"a": 1}\n[1]\n', "line 2"),
    (b'{"a": 1}\n"' + b"x" * 10_000_000 + b'"\n', r"line 2.*8 MiB"), (b'{"a": "\xff"}\n', "line 1"),
    (b'{"a": 1}\n' * 60_000 + b"oops\n", "line 60001"), (None, "No such file"),
    (b'{"a": 1}\n' * 600_000 + b'{"a": ', "last line"),
])
def test_a_file_that_is_no_json_lines_is_refused_before_a_draft(
    server: LocalYandexGPT, client: ClientConfig, tmp_path: Any, content: Any, says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    for refuse in (lambda: Dataset.upload(path, client=client), lambda: Model("yandexgpt", client=client).tune_deferred(path)):
        with pytest.raises(ConfigError, match=says):
            refuse()
    assert not server.requests


def test_windows_line_ends_and_a_missing_last_one_are_fine(client: ClientConfig, tmp_path: Any) -> None:
    path = tmp_path / "crlf.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert Dataset.upload(str(path), client=client).rows_count == 5


def test_a_failed_upload_deletes_its_draft(server: LocalYandexGPT, client: ClientConfig, rows_file: Any) -> None:
    server.next(*[Reply(500, "<b>full</b>")], path="/storage/")
    with pytest.raises(ServerError, match="full") as caught:
        Dataset.upload(rows_file, client=patient(client))
    assert "X-Amz" not in str(caught.value)
    assert Dataset.list(client=client) == ()


def test_invalid_data_stays_for_a_look(client: ClientConfig) -> None:
    with pytest.raises(DatasetValidationError, match="rows") as caught:
        Dataset.upload([{"nope": 1}, *ROWS], client=client)
    assert caught.value.errors[0]["rows"] == [1]
    assert Dataset.get(caught.value.dataset_id, client=client).status == "INVALID"


def test_parts_go_in_parallel_and_are_retried_one_by_one(
    server: LocalYandexGPT, client: ClientConfig, rows_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yandex_gpt, "_PART", 60)
    server.min_part = 1
    server.next(Reply(503), Reset(), path="/storage/")
    dataset = Dataset.upload(rows_file, client=patient(client))
    assert list(dataset.rows()) == ROWS
    puts = [r for r in server.requests if r.method == "PUT"]
    size = rows_file.stat().st_size
    assert len(puts) == -(-size // 60) + 2
    started = next(r.json for r in server.requests if r.path.endswith("StartMultipartUploadDraft"))
    assert started["parts"] == str(-(-size // 60))


def test_a_secret_url_shows_in_no_error(server: LocalYandexGPT, client: ClientConfig, rows_file: Any) -> None:
    server.next(*[Reset(taken=False)] * 2, path="/storage/")
    with pytest.raises(ConnectionFailed) as caught:
        Dataset.upload(rows_file, client=patient(client, max_attempts=2))
    chain, shown = caught.value, ""
    while chain is not None:
        shown += repr(chain) + str(chain)
        chain = chain.__cause__ or chain.__context__
    assert "X-Amz" not in shown
    assert "/storage/" not in shown


TUNED: list[Any] = [
    (lambda d: d, [1.0]), (lambda d: d.id, [1.0]), (lambda d: (d, 0.5), [0.5]), (lambda d: [d, (d.id, 2)], [1.0, 2.0]),
    (lambda d: {d: 0.3}, [0.3]), (lambda d: {d.id: 3}, [3.0]), (lambda d: iter([d]), [1.0]),
]


@pytest.mark.parametrize(("form", "weights"), TUNED)
def test_tuning_takes_datasets_in_every_form(server: LocalYandexGPT, client: ClientConfig, form: Any, weights: Any) -> None:
    dataset = Dataset.upload(ROWS, client=client)
    Model("yandexgpt-lite", client=client).tune_deferred(form(dataset), validation_datasets=form(dataset))
    sent = next(r.json for r in server.requests if r.path.endswith("/Tune"))
    assert sent["trainDatasets"] == sent["validationDatasets"] == [{"datasetId": dataset.id, "weight": w} for w in weights]
    assert sent["textToTextCompletion"] == {}


@pytest.mark.parametrize("wrong", [5, None, [], {}, [5], ("a", "b", 3), [("a", "x")], {"a": 0}, {"a": float("nan")}, "a/b"])
def test_what_is_no_dataset_is_refused(server: LocalYandexGPT, client: ClientConfig, wrong: Any) -> None:
    with pytest.raises((TypeError, ConfigError), match="train_datasets"):
        Model("yandexgpt-lite", client=client).tune_deferred(wrong)
    assert not server.requests


def test_tuning_from_a_file_to_a_model_that_answers(server: LocalYandexGPT, client: ClientConfig, rows_file: Any) -> None:
    model = Model("yandexgpt-lite", client=client).configure(temperature=0.3)
    operation = model.tune_deferred(
        rows_file, name="n", description="d", labels={"k": "v"}, seed=7, lr=1e-4, n_samples=10, additional_arguments="x",
        tuning_type=Lora(rank=8, alpha=0.5, initialization="i", type="t"), scheduler=CosineScheduler(0.1, 0.2),
        optimizer=AdamW(0.9, 0.99, 1e-8, 0.1))
    sent = server.requests[-1]
    assert sent.headers["idempotency-key"]
    assert sent.json["textToTextCompletion"] == {
        "seed": "7", "lr": 1e-4, "nSamples": "10", "additionalArguments": "x",
        "lora": {"rank": "8", "alpha": 0.5, "initialization": "i", "type": "t"},
        "scheduler": {"cosine": {"minLr": 0.1}, "warmupRatio": 0.2},
        "optimizer": {"adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weightDecay": 0.1}}}
    assert operation.metrics_url() is None
    seen: list[Any] = []
    there = pickle.loads(pickle.dumps(operation))
    tuned = there.wait(poll_interval=0.01, on_status=seen.append)
    assert [s.progress for s in seen] == sorted(s.progress for s in seen)
    assert seen[-1].progress == 1.0
    assert (tuned.config, tuned.run("hello").text) == (model.config, "Hello! How can I help you?")
    assert operation.metrics_url()
    attached = model.attach_tune_deferred(operation.task_id)
    assert attached.id == operation.id
    assert attached.get_result() == tuned
    server.forget(next(id for id, op in server.operations.items() if op["description"].lower().startswith("tun")))
    assert attached.get_result() == tuned


def test_a_batch_from_a_file_to_its_rows(server: LocalYandexGPT, client: ClientConfig, rows_file: Any) -> None:
    operation = Model("yandexgpt-lite", client=client).configure(max_tokens=100, temperature=0.1).batch_deferred(rows_file)
    assert operation.id == operation.task_id in server.batches
    answers = pickle.loads(pickle.dumps(operation)).wait(poll_interval=0.01)
    assert [row["response"] for row in answers.rows()] == [f"You said: q{n}" for n in range(5)]
    sent = next(r.json for r in server.requests if r.path.endswith("TextGenerationBatchService/Completion"))
    assert sent["completionOptions"] == {"maxTokens": "100", "temperature": 0.1}
    running = Model("yandexgpt-lite", client=client).batch_deferred(answers)
    running.cancel()
    with pytest.raises(OperationError, match="CANCELLED"):
        running.wait(poll_interval=0.01)


@pytest.mark.parametrize("fault", [Reset(), GoAway(), Cut(3)], ids=repr)
@pytest.mark.parametrize("name", ["Tune", "TextGenerationBatchService/Completion", "DatasetService/Create"])
def test_what_creates_over_grpc_is_not_sent_again(server: LocalYandexGPT, client: ClientConfig, fault: Any, name: str) -> None:
    model = Model("yandexgpt-lite", client=patient(client))
    acts: dict[str, Any] = {"DatasetService/Create": lambda: Dataset.upload(ROWS, client=model.client)}
    dataset = "fds1" if name == "DatasetService/Create" else Dataset.upload(ROWS, client=model.client).id
    acts["Tune"] = lambda: model.tune_deferred(dataset)
    server.requests.clear()
    server.next(fault, path=name)
    with pytest.raises(ConnectionFailed, match="may have taken") as caught:
        acts.get(name, lambda: model.batch_deferred(dataset))()
    assert caught.value.idempotency_key
    assert len([r for r in server.requests if r.path.endswith(name)]) == 1


def test_reads_over_grpc_are_sent_again_and_keep_the_deadline(server: LocalYandexGPT, client: ClientConfig) -> None:
    server.next(Reset(), Reply(503), GoAway(), path="DatasetService/List")
    assert Dataset.list(client=patient(client)) == ()
    server.next(Stall(), path="DatasetService/List")
    with pytest.raises(DeadlineExceeded):
        Dataset.list(client=client, timeout=0.3)
    server.release()


def test_commands_tune_and_batch(server: LocalYandexGPT, shell: Any, rows_file: Any, tmp_path: Any) -> None:
    server.polls = 0
    status, out, err = shell("tune", str(rows_file), "--model", "yandexgpt-lite")
    assert (status, out.startswith("gpt://")) == (0, True)
    assert re.fullmatch(r"tune:\S+\n", err)
    assert shell("operation", err.strip())[1] == out
    status, out, err = shell("batch", str(rows_file), "-o", str(tmp_path / "out.jsonl"))
    assert (status, out) == (0, "")
    assert re.fullmatch(r"batch:\S+\n", err)
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["response"] == "You said: q0"


# --- LangChain, Dask, README ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Model, ChatModel])
def test_langchain_invokes_streams_binds_and_stops(server: LocalYandexGPT, client: ClientConfig, kind: Any) -> None:
    pytest.importorskip("langchain_core")
    llm = kind("yandexgpt", client=client).langchain()
    answer = llm.invoke("hello", stop=["can"])
    assert answer.content == "Hello! How "
    assert answer.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.content for chunk in llm.stream("hello", stop=["ow c"])) == "Hello! H"
    assert [answer.content for answer in llm.batch(["hello", "more"])] == ["Hello! How can I help you?", "You said: more"]
    asked = llm.bind_tools([weather]).invoke("weather in Omsk and Tomsk")
    assert [call["args"]["city"] for call in asked.tool_calls] == ["Omsk", "Tomsk"]
    from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage

    results = [ToolMessage(call["args"]["city"], tool_call_id=call["id"]) for call in asked.tool_calls]
    talk = [SystemMessage("s"), HumanMessage("weather in Omsk and Tomsk"), asked, *results]
    assert llm.bind_tools([weather]).invoke(talk).content == "The tools say: Omsk; Tomsk"
    assert llm.with_structured_output(FunctionTool.from_function(weather).parameters | {"title": "w"}).invoke("Omsk")


def test_langchain_s_own_unit_tests_pass(tmp_path: Any) -> None:
    pytest.importorskip("langchain_tests")
    (tmp_path / "test_standard.py").write_text(textwrap.dedent("""
        import yandex_gpt
        from langchain_tests.unit_tests import ChatModelUnitTests

        class TestOurs(ChatModelUnitTests):
            @property
            def chat_model_class(self):
                return yandex_gpt._chat_class()

            @property
            def chat_model_params(self):
                return {"model": yandex_gpt.Model("yandexgpt", folder_id="b1g", auth="key")}
    """))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)})
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_dask_cluster_maps_prompts_none_lost_or_doubled(server: LocalYandexGPT, model: Model) -> None:
    distributed = pytest.importorskip("dask.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with distributed.Client(n_workers=2, threads_per_worker=4, dashboard_address=None) as cluster:
            prompts = [f"prompt {n}" for n in range(200)]
            answers = cluster.gather(cluster.map(model.run, prompts))
    assert [str(answer) for answer in answers] == [f"You said: {prompt}" for prompt in prompts]
    assert len(server.requests) == 200


README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_every_readme_example_prints_what_it_shows(server: LocalYandexGPT, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for name, value in {"YANDEX_GPT_ENDPOINT": server.url, "YC_FOLDER_ID": "b1glocal", "YC_API_KEY": "local"}.items():
        monkeypatch.setenv(name, value)
    pause = time.sleep
    monkeypatch.setattr(yandex_gpt.time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for example in examples(README):
        if example.needs and importlib.util.find_spec(example.needs) is None:
            continue
        with warnings.catch_warnings():
            if example.needs:
                warnings.simplefilter("ignore")
            printed = run_example(example, names)
        ran += 1
        if example.shown is not None:
            assert printed == example.shown, example.code
    assert ran >= 15
    defaults = inspect.signature(Model.run).parameters["timeout"].default, RetryConfig().max_attempts
    assert defaults == (180, 5)


def test_the_tour_runs_with_requests_alone() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60, check=False,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert "Rayleigh" in done.stdout


# --- gRPC: the table, the codec, HTTP/2, against software that is not ours ------------------------


SERVICES = {
    "yandex.cloud.ai.tuning.v1.tuning_service": ["Tune", "Describe", "List", "Cancel", "GetMetricsUrl"],
    "yandex.cloud.ai.dataset.v1.dataset_service": [
        "Create", "GetUploadDraftUrl", "StartMultipartUploadDraft", "FinishMultipartUploadDraft",
        "Validate", "Describe", "List", "Delete", "GetDownloadUrls"],
    "yandex.cloud.ai.batch_inference.v1.batch_inference_service": ["Describe", "Cancel", "Delete"],
    "yandex.cloud.ai.foundation_models.v1.text_generation.text_generation_service": ["Completion"],
    "yandex.cloud.operation.operation_service": ["Get", "Cancel"],
}  # fmt: skip
ONLY = {"text_generation_service": "TextGenerationBatchService"}
IN_ANY = [
    "yandex.cloud.ai.tuning.v1.TuningMetadata",
    "yandex.cloud.ai.tuning.v1.TuningResponse",
    "yandex.cloud.ai.dataset.v1.ValidateDatasetMetadata",
    "yandex.cloud.ai.dataset.v1.ValidateDatasetResponse",
    "yandex.cloud.ai.foundation_models.v1.BatchCompletionMetadata",
    "yandex.cloud.ai.foundation_models.v1.BatchCompletionResponse",
    "google.protobuf.Empty",
]
# Fields of TuningRequest that this module never sends (other tasks' members of the oneof).
NOT_SENT = {
    "textClassificationMultilabel", "textClassificationMulticlass", "textEmbeddingPairParams",
    "textEmbeddingTripletParams",
}  # fmt: skip
DESCRIBE = "yandex.cloud.ai.tuning.v1.TuningService/Describe"
OK_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


def official_methods():
    "(full method, descriptor) of all the module's methods, from Yandex's generated code."
    pytest.importorskip("yandex.cloud.operation.operation_service_pb2")
    for name, methods in SERVICES.items():
        pb2 = importlib.import_module(name + "_pb2")
        for service in pb2.DESCRIPTOR.services_by_name.values():
            if service.name == ONLY.get(name.rpartition(".")[2], service.name):
                for method in methods:
                    yield f"{service.full_name}/{method}", service.methods_by_name[method]


def is_repeated(field):
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == 3


def message_class(descriptor):
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(descriptor)


def call(url, method=DESCRIBE, body=None, timeout=5.0, headers=None, **kwargs):
    yandex_gpt._THREAD.exchange = types.SimpleNamespace(deadline=yandex_gpt._Deadline(timeout), sent=False)
    request = requests.Request(
        "POST", f"{url}/{method}", json=body or {}, headers=headers
    ).prepare()
    return yandex_gpt._GRPCAdapter().send(request, **kwargs)


# --- The table -------------------------------------------------------------------


def official_messages():
    "Every (name in the table, official descriptor) that the module's methods can reach."
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pool, empty_pb2, wrappers_pb2  # noqa: F401

    for name, method in official_methods():
        yield name, method.input_type
        yield name + ">", method.output_type
    for name in IN_ANY:
        yield name, descriptor_pool.Default().FindMessageTypeByName(name)


def test_table_has_every_method_and_no_other():
    methods = {name for name, _ in official_methods()}
    assert {
        name[:-1] for name in yandex_gpt._table()[0] if name.endswith(">") and "/" in name
    } >= methods
    assert {
        name
        for name in yandex_gpt._table()[0]
        if "/" in name and name[-1] != ">" and name[0] not in "/%"
    } == methods


def test_table_equals_the_official_descriptors():
    messages, enums = yandex_gpt._table()
    seen = set()

    def compare(name, descriptor):
        if (name, descriptor.full_name) in seen:
            return
        seen.add((name, descriptor.full_name))
        fields = {f.json_name: f for f in descriptor.fields if f.json_name not in NOT_SENT}
        assert list(messages[name]) == [
            f.json_name for f in sorted(fields.values(), key=lambda f: f.number)
        ], name
        for key, (number, wire, kind, label) in messages[name].items():
            field, where = fields[key], f"{descriptor.full_name}.{key}"
            entry = field.message_type is not None and field.message_type.GetOptions().map_entry
            assert field.number == number, where
            assert label == ("%" if entry else "*" if is_repeated(field) else label), where
            if label not in ("%", "*") and not field.message_type:
                assert (label == "?") == field.has_presence or name[0] == "%", where
            if field.message_type is not None:
                assert wire == 2 and kind in messages, where
                compare(kind, field.message_type)
            elif field.enum_type is not None:
                values = field.enum_type.values_by_number
                assert wire == 0 and enums[kind] == [values[n].name for n in range(len(values))], (
                    where
                )
            else:
                types = {1: "double", 3: "int64", 5: "int32", 8: "bool", 9: "string", 12: "bytes"}
                assert kind == types[field.type], where
                assert wire == {"double": 1, "string": 2, "bytes": 2}.get(kind, 0), where

    for name, descriptor in official_messages():
        compare(name, descriptor)
    assert len(seen) > 60


# --- The codec -------------------------------------------------------------------


class Random:
    "Random messages made by the official classes."

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def fill(self, message, depth=0):
        rng, name = self.rng, message.DESCRIPTOR.full_name
        if name == "google.protobuf.Any":
            if rng.random() < 0.8:
                from google.protobuf import descriptor_pool

                pool = descriptor_pool.Default()
                inner = rng.choice(
                    [*IN_ANY, "google.protobuf.Struct", "google.protobuf.Int64Value"]
                )
                message.Pack(
                    self.fill(message_class(pool.FindMessageTypeByName(inner))(), depth + 1)
                )
            return message
        if name == "google.protobuf.Timestamp":
            message.seconds = rng.choice([0, -62135596800, 253402300799, rng.randrange(1 << 32)])
            message.nanos = rng.choice([0, 1, 120000000, 123456000, 999999999])
            return message
        if name == "google.protobuf.Value" and depth > 8:
            message.null_value = 0
            return message
        fields = [f for f in message.DESCRIPTOR.fields if f.json_name not in NOT_SENT]
        if name == "google.protobuf.Value":
            fields = [rng.choice(fields)]
        for field in fields:
            oneof = field.containing_oneof
            if (
                (name != "google.protobuf.Value"
                and rng.random() < 0.3)
                or (oneof
                and message.WhichOneof(oneof.name))
            ):
                continue
            if field.message_type and field.message_type.GetOptions().map_entry:
                for _ in range(rng.randrange(3)):
                    value = field.message_type.fields_by_name["value"]
                    if value.message_type:
                        self.fill(getattr(message, field.name)[self.text()], depth + 1)
                    else:
                        getattr(message, field.name)[self.text()] = self.text()
            elif is_repeated(field):
                for _ in range(rng.randrange(4)):
                    if field.message_type:
                        self.fill(getattr(message, field.name).add(), depth + 1)
                    else:
                        getattr(message, field.name).append(self.scalar(field))
            elif field.message_type:
                getattr(message, field.name).SetInParent()
                self.fill(getattr(message, field.name), depth + 1)
            else:
                value = self.scalar(field)
                if (
                    name == "google.protobuf.Value"
                    and isinstance(value, float)
                    and not math.isfinite(value)
                ):
                    value = 0.5
                setattr(message, field.name, value)
        return message

    def text(self):
        return self.rng.choice(["", "0", "ключ", "\0" * 8, "a\u2028b\x85", "😀" * 40, "x" * 200])

    def scalar(self, field):
        rng = self.rng
        if field.enum_type:
            known = [value.number for value in field.enum_type.values]
            return rng.choice([*known, *([] if len(known) == 1 else [77])])
        return {
            1: lambda: rng.choice(
                [0.0, -0.0, 1.0, 0.1, 1e300, math.inf, -math.inf, math.nan, rng.random()]
            ),
            3: lambda: rng.choice(
                [0, 1, -1, 127, 128, (1 << 63) - 1, -(1 << 63), rng.getrandbits(40)]
            ),
            5: lambda: rng.choice([0, 1, -1, (1 << 31) - 1, -(1 << 31)]),
            8: lambda: rng.random() < 0.5,
            9: self.text,
            12: lambda: rng.randbytes(rng.randrange(20)),
        }[field.type]()


def plain(value):
    "JSON in one form, so that -0.0 is not 0.0 and 1 is not True."
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def test_random_messages_decode_to_what_json_format_says():
    json_format = pytest.importorskip("google.protobuf.json_format")
    messages, rng = list(official_messages()), Random(1)
    for _ in range(12):
        for name, descriptor in messages:
            message = rng.fill(message_class(descriptor)())
            decoded = yandex_gpt._decode_message(name, message.SerializeToString())
            assert plain(decoded) == plain(json_format.MessageToDict(message)), name


def test_random_requests_encode_to_an_equal_message():
    json_format = pytest.importorskip("google.protobuf.json_format")
    rng = Random(2)
    for _ in range(20):
        for name, method in official_methods():
            message = rng.fill(message_class(method.input_type)())
            value = json_format.MessageToDict(message)
            wanted = json_format.ParseDict(value, message_class(method.input_type)())
            made = message_class(method.input_type)()
            made.ParseFromString(yandex_gpt._encode_message(name, value))
            assert plain(json_format.MessageToDict(made)) == plain(
                json_format.MessageToDict(wanted)
            ), name
            assert made == wanted or "NaN" in plain(value), name


def test_packed_unpacked_and_unknown_fields():
    table = "yandex.cloud.ai.dataset.v1.ValidateDatasetResponse"
    packed, unpacked = b"\x1a\x05\x1a\x03\x01\xac\x02", b"\x1a\x05\x18\x01\x18\xac\x02"
    for wire in (
        packed,
        unpacked,
        packed + b"\xf8\x7f\x01\xf9\x7f12345678\xfa\x7f\x01x\xfd\x7f1234",
    ):
        assert yandex_gpt._decode_message(table, wire) == {"errors": [{"rowNumbers": ["1", "300"]}]}


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x0a\x05ab", id="cut string"),
        pytest.param(b"\x0a", id="no size"),
        pytest.param(b"\x80" * 11, id="endless varint"),
        pytest.param(b"\x0b", id="group"),
        pytest.param(b"\x0a\x01\xff", id="not UTF-8"),
        pytest.param(b"\x1a\x06\x08\xff\xff\xff\xff\xff\xff\xff\x7f", id="cut timestamp"),
        pytest.param(b"\x1a\x0a\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f", id="year 3e11"),
    ],
)
def test_malformed_messages_are_connection_failures(wire):
    with peer(h2_answer(wire)) as url, pytest.raises(ConnectionFailed):
        call(url, "yandex.cloud.operation.OperationService/Get", {"operationId": "a"})


def test_nesting_is_bounded():
    value = None
    for _ in range(200):
        value = [value]
    with pytest.raises(ConfigError, match="deep"):
        yandex_gpt._encode_message("Struct", {"a": value})
    wire = b""
    for _ in range(200):
        wire = b"\x0a" + yandex_gpt._to_varint(len(wire)) + wire  # a Value in a list in a Value
        wire = b"\x32" + yandex_gpt._to_varint(len(wire)) + wire
    with pytest.raises(ValueError, match="deep"):
        yandex_gpt._decode_message("Value", wire)


@pytest.mark.parametrize(
    "body, words",
    [
        pytest.param({"nope": 1}, "nope", id="unknown field"),
        pytest.param({"baseModelUri": 5}, "baseModelUri", id="number for text"),
        pytest.param({"baseModelUri": "\ud800"}, "baseModelUri", id="lone surrogate"),
        pytest.param({"trainDatasets": {"datasetId": "a"}}, "trainDatasets", id="no list"),
        pytest.param(
            {"trainDatasets": [{"weight": "x"}]}, "trainDatasets.weight", id="text for double"
        ),
        pytest.param(
            {"trainDatasets": [{"weight": True}]}, "trainDatasets.weight", id="bool for double"
        ),
        pytest.param({"textToTextCompletion": {"seed": 1 << 63}}, "seed", id="65 bits"),
        pytest.param({"textToTextCompletion": {"seed": 1.5}}, "seed", id="fraction"),
        pytest.param({"textToTextCompletion": {"seed": True}}, "seed", id="bool for int"),
        pytest.param({"textToTextCompletion": 5}, "textToTextCompletion", id="no object"),
        pytest.param({"labels": {"a": 1}}, "labels", id="label's value"),
        pytest.param({"labels": [1]}, "labels", id="labels"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_sent(body, words):
    with pytest.raises(ConfigError, match=words):
        call("grpc://127.0.0.1:1", "yandex.cloud.ai.tuning.v1.TuningService/Tune", body)
    assert not yandex_gpt._THREAD.exchange.sent


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="Nope"):
        call("grpc://127.0.0.1:1", "a.B/Nope")


# --- HPACK -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "block, headers",
    [
        # RFC 7541, appendices C.2.2, C.2.3, C.2.4, C.4.1 and C.6.1
        ("040c2f73616d706c652f70617468", [(":path", "/sample/path")]),
        ("100870617373776f726406736563726574", [("password", "secret")]),
        ("82", [(":method", "GET")]),
        ("828684418cf1e3c2e5f23a6ba0ab90f4ff", [(":method", "GET"), (":scheme", "http"), (":path", "/"),
                                              (":authority", "www.example.com")]),
        ("488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad1718"
         "63c78f0b97c8e9ae82ae43d3",
         [(":status", "302"), ("cache-control", "private"), ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
          ("location", "https://www.example.com")]),
        ("20", []),
        ("2088", [(":status", "200")]),
    ],
)  # fmt: skip
def test_hpack_of_the_rfc(block, headers):
    assert list(yandex_gpt._hpack_headers(bytes.fromhex(block)).items()) == headers


@pytest.mark.parametrize(
    "block",
    [
        "80",
        "be",
        "3fe10f",
        "21",
        "ffffffffffffffffffffff",
        "0085",
        "00810a00",
        "0081fe00",
        "0084ffffffff00",
    ],
)
def test_broken_hpack(block):
    with pytest.raises((ValueError, LookupError)):
        yandex_gpt._hpack_headers(bytes.fromhex(block))


def test_huffman_code_is_complete():
    codes = yandex_gpt._huffman_codes()
    assert len(codes) == 257 and sum(2.0 ** -len(code) for code in codes) == 1


# --- A hostile peer --------------------------------------------------------------


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literals(headers):
    return b"".join(
        b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in headers
    )


SETTINGS = frame(4)
TRAILERS = frame(1, 5, 1, literals([("grpc-status", "0")]))


def h2_answer(message=b"", flag=0):
    body = struct.pack(">BI", flag, len(message)) + message
    return SETTINGS + frame(1, 4, 1, literals(OK_HEADERS)) + frame(0, 0, 1, body) + TRAILERS


class Peer:
    "Reads the client's frames for the script of one connection."

    def __init__(self, sock):
        self.sock = sock
        self.file = sock.makefile("rb")

    def preface(self):
        preface = self.file.read(24)
        if not preface:
            raise EOFError
        assert preface == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def frame(self):
        head = self.file.read(9)
        if len(head) < 9:
            raise EOFError
        return (
            head[3],
            head[4],
            int.from_bytes(head[5:], "big"),
            self.file.read(int.from_bytes(head[:3], "big")),
        )

    def until(self, kind, flags=0):
        while True:
            found = self.frame()
            if found[0] == kind and found[1] & flags == flags:
                return found

    def send(self, data):
        self.sock.sendall(data)


@contextlib.contextmanager
def peer(script, family=socket.AF_INET, wrap=None):
    "A server of one connection: bytes to say after the request, or a function of a Peer."
    server = socket.socket(family)
    server.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    server.listen()
    failures = []

    def run():
        with contextlib.suppress(OSError, EOFError):
            sock, _ = server.accept()
            with sock, wrap(sock) if wrap else contextlib.nullcontext(sock) as inner:
                client = Peer(inner)
                try:
                    if callable(script):
                        script(client)
                    else:
                        client.preface()
                        client.send(SETTINGS)
                        client.until(0, 1)
                        client.send(script)
                        client.sock.shutdown(socket.SHUT_WR)
                        client.file.read()
                except AssertionError as error:
                    failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield "grpc://{}:{}".format(*server.getsockname()[:2])
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
        assert not failures and not thread.is_alive()


def http1(client):
    client.preface()
    client.until(4)
    client.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def silent(client):
    client.file.read()


def closed(stage):
    def script(client):
        if stage == 0:
            return None
        client.preface()
        if stage == 1:
            return client.send(SETTINGS[:5])
        client.send(SETTINGS)
        client.until(0, 1)
        if stage >= 3:
            client.send(frame(1, 4, 1, literals(OK_HEADERS)))
        if stage >= 4:
            client.send(frame(0, 0, 1, b"\0\0\0\0\0"))

    return script


def flood(what):
    def script(client):
        client.preface()
        client.send(SETTINGS)
        client.until(0, 1)
        while True:
            client.send(what)

    return script


def headers_then(what):
    return SETTINGS + frame(1, 4, 1, literals(OK_HEADERS)) + what


@pytest.mark.parametrize(
    "script, words",
    [
        pytest.param(
            frame(7, 0, 0, struct.pack(">II", 0, 11) + b"calm down"), "GOAWAY 11.*calm", id="GOAWAY"
        ),
        pytest.param(
            frame(7, 0, 0, struct.pack(">II", 0, 0)), "GOAWAY", id="GOAWAY, call not taken"
        ),
        pytest.param(frame(7, 0, 0, b""), ".", id="empty GOAWAY"),
        pytest.param(frame(3, 0, 1, struct.pack(">I", 7)), "RST_STREAM 7", id="RST_STREAM"),
        pytest.param(http1, r"HTTP/1\.1", id="HTTP/1.1"),
        pytest.param(
            lambda client: client.sock.shutdown(socket.SHUT_RDWR), ".", id="shuts at once"
        ),
        pytest.param(closed(0), ".", id="closed before anything"),
        pytest.param(closed(1), ".", id="closed in SETTINGS"),
        pytest.param(closed(2), ".", id="closed before headers"),
        pytest.param(closed(3), ".", id="closed before data"),
        pytest.param(closed(4), ".", id="closed before trailers"),
        pytest.param(b"\xff\xff\xff\0\0\0\0\0\1", "16777215", id="frame of 16 MiB"),
        pytest.param(flood(frame(1, 0, 1, b"")), ".", id="HEADERS in HEADERS"),
        pytest.param(
            frame(1, 0, 1, b"") + frame(9, 0, 1, literals([("a", "b" * 90)]) * 170) * 5,
            "headers over",
            id="endless headers",
        ),
        pytest.param(flood(frame(6, 0, 0, bytes(8))), "without", id="PING flood"),
        pytest.param(flood(frame(0, 0, 1, b"")), "without", id="empty DATA flood"),
        pytest.param(flood(frame(99, 0, 1, b"")), "without", id="unknown frames flood"),
        pytest.param(flood(SETTINGS), "without", id="SETTINGS flood"),
        pytest.param(
            frame(1, 0, 1, b"") + frame(9, 0, 1, b"") * 3000,
            "without",
            id="empty CONTINUATION flood",
        ),
        pytest.param(frame(1, 0, 1, b"") + frame(0, 0, 1, b""), "turn", id="interrupted headers"),
        pytest.param(frame(9, 4, 1, b"\x88"), "turn", id="CONTINUATION of nothing"),
        pytest.param(frame(5, 4, 1, b"\0\0\0\2"), "PUSH_PROMISE", id="PUSH_PROMISE"),
        pytest.param(frame(1, 5, 3, b"\x88"), "stream 3", id="HEADERS of another stream"),
        pytest.param(frame(4, 0, 1), "stream 1", id="SETTINGS of a stream"),
        pytest.param(frame(4, 0, 0, b"12345"), ".", id="SETTINGS of 5 bytes"),
        pytest.param(frame(8, 0, 0, b"1"), ".", id="WINDOW_UPDATE of 1 byte"),
        pytest.param(frame(1, 12, 1, b"\5\x88"), "padding", id="too much padding"),
        pytest.param(frame(1, 12, 1, b""), ".", id="padding of nothing"),
        pytest.param(frame(1, 5, 1, b"\xbe"), ".", id="dynamic table"),
        pytest.param(frame(1, 5, 1, b"\x88"), "grpc-status", id="200 without grpc-status"),
        pytest.param(frame(1, 5, 1, literals([("grpc-status", "0")])), ".", id="no status"),
        pytest.param(frame(1, 5, 1, literals([(":status", "x")])), ".", id="status x"),
        pytest.param(
            frame(1, 5, 1, b"\x88" + literals([("grpc-status", "x")])), ".", id="grpc-status x"
        ),
        pytest.param(
            frame(1, 5, 1, b"\x88" + literals([("grpc-status", "0")])), "message", id="no message"
        ),
        pytest.param(h2_answer(b"x", flag=1), "compressed", id="compressed"),
        pytest.param(
            headers_then(frame(0, 0, 1, b"\0\0\0\0\5abc") + TRAILERS), "message", id="cut message"
        ),
        pytest.param(
            headers_then(frame(0, 0, 1, b"\0\0\0\0\0" * 2) + TRAILERS), "message", id="two messages"
        ),
    ],
)
def test_a_peer_that_breaks_the_protocol(script, words):
    with peer(script) as url, pytest.raises(ConnectionFailed, match=words) as failure:
        call(url)
    assert "127.0.0.1" in str(failure.value)


def test_message_size_is_bounded(monkeypatch):
    monkeypatch.setattr(yandex_gpt, "_MAX_MESSAGE_BYTES", 100_000)
    with peer(flood(headers_then(b"")[len(SETTINGS) :] + frame(0, 0, 1, bytes(16384)) * 10)) as url:
        with pytest.raises(ConnectionFailed, match="over 100000 bytes"):
            call(url)


def trickle(client):
    client.preface()
    client.send(SETTINGS + frame(1, 4, 1, literals(OK_HEADERS)))
    while True:
        client.send(frame(0, 0, 1, b"\0"))
        time.sleep(0.01)


def tiny_window(client):
    client.preface()
    client.send(frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    client.file.read()


@pytest.mark.parametrize("script", [silent, trickle, tiny_window])
def test_the_deadline_holds(script):
    start = time.monotonic()
    with peer(script) as url, pytest.raises(DeadlineExceeded):
        call(url, timeout=0.2)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "script, sent",
    [
        (http1, False),
        (closed(0), False),
        (closed(1), False),
        (closed(2), True),
        (frame(3, 0, 1, bytes(4)), True),
    ],
)
def test_sent_says_whether_the_service_may_have_taken_it(script, sent):
    with peer(script) as url, pytest.raises(ConnectionFailed):
        call(url)
    assert yandex_gpt._THREAD.exchange.sent is sent


TASK = bytes.fromhex("0a050a03616263")  # {"tuningTask": {"taskId": "abc"}}
BODY = struct.pack(">BI", 0, len(TASK)) + TASK
HEAD = literals(OK_HEADERS)


def opened_late(client):
    client.preface()
    client.send(frame(4, 0, 0, struct.pack(">HI", 4, 1)))
    client.until(1)
    assert client.until(0)[3] == b"\0"
    client.send(frame(8, 0, 1, struct.pack(">I", 2)))
    assert client.until(0)[3] == b"\0\0"
    client.send(frame(4, 0, 0, struct.pack(">HI", 4, 65535)))
    client.until(0, 1)
    client.send(h2_answer(TASK))
    client.until(8)


def refused_early(client):
    "An answer before the request could be sent."
    client.preface()
    client.send(frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    client.until(1)
    client.send(h2_answer(TASK))
    client.file.read()


LARGE = b"\x12" + yandex_gpt._to_varint(40_000) + bytes(40_000)  # an unknown field of 40,000 bytes


def hangs_up(client):
    "The whole answer, and the connection's end at once: no one takes the window updates."
    client.preface()
    client.send(SETTINGS)
    client.until(0, 1)
    body = struct.pack(">BI", 0, len(LARGE + TASK)) + LARGE + TASK
    parts = [frame(0, 0, 1, body[at : at + 16000]) for at in range(0, len(body), 16000)]
    client.send(frame(1, 4, 1, literals(OK_HEADERS)) + b"".join(parts) + TRAILERS)
    client.file.close()
    client.sock.close()


def hangs_up_on_the_request(client):
    "An error before the request is whole, and the connection's end."
    client.preface()
    client.send(frame(4, 0, 0, struct.pack(">HI", 4, 1)))
    client.until(0)
    client.send(h2_answer(TASK) + frame(8, 0, 1, struct.pack(">I", 65535)))
    client.file.close()
    client.sock.close()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(hangs_up, id="hangs up at once"),
        pytest.param(hangs_up_on_the_request, id="hangs up on the request"),
        pytest.param(h2_answer(TASK), id="plain"),
        pytest.param(opened_late, id="tiny window opened late"),
        pytest.param(refused_early, id="answer before the request"),
        pytest.param(
            frame(1, 0, 1, HEAD[:3]) + frame(9, 0, 1, HEAD[3:9]) + frame(9, 4, 1, HEAD[9:])
            + frame(0, 0, 1, BODY) + TRAILERS, id="CONTINUATION"),
        pytest.param(
            frame(1, 0x2C, 1, b"\4" + b"\0\0\0\0\7" + HEAD + bytes(4)) + frame(0, 8, 1, b"\3" + BODY + bytes(3))
            + TRAILERS, id="padding and priority"),
        pytest.param(
            frame(1, 4, 1, HEAD) + b"".join(frame(0, 0, 1, bytes([byte])) for byte in BODY) + TRAILERS,
            id="a byte at a time"),
        pytest.param(
            frame(1, 4, 1, literals([(":status", "103"), ("link", "x")])) + h2_answer(TASK), id="early hints"),
        pytest.param(
            frame(7, 0, 0, struct.pack(">II", 0x7FFFFFFF, 0)) + frame(77, 255, 9, b"?") + frame(2, 0, 5, bytes(5))
            + frame(6, 0, 0, b"12345678") + frame(8, 0, 3, bytes(4)) + h2_answer(TASK),
            id="graceful GOAWAY, unknown, PRIORITY, PING, WINDOW_UPDATE of another stream"),
    ],
)  # fmt: skip
def test_a_peer_that_is_odd_but_right(script):
    with peer(script) as url:
        response = call(url)
    assert response.status_code == 200
    assert response.json() == {"tuningTask": {"taskId": "abc"}}
    assert response.headers["Content-Type"] == "application/json"


def test_ping_and_settings_are_answered():
    def script(client):
        client.preface()
        client.send(SETTINGS)
        client.until(4, 1)
        client.send(frame(6, 0, 0, b"12345678"))
        assert client.until(6, 1)[3] == b"12345678"
        client.send(h2_answer(TASK))
        client.file.read()

    with peer(script) as url:
        assert call(url).ok


@pytest.mark.parametrize(
    "code, status",
    [(1, 499), (2, 500), (3, 400), (4, 504), (5, 404), (6, 409), (7, 403), (8, 429), (9, 400), (10, 409),
     (11, 400), (12, 501), (13, 500), (14, 503), (15, 500), (16, 401), (99, 500), (-1, 500)],
)  # fmt: skip
def test_trailers_only_errors(code, status):
    trailers = [
        ("grpc-status", str(code)),
        ("grpc-message", "%D0%BD%D0%B5%D1%82 100%"),
        ("retry-after", "7"),
    ]
    with peer(frame(1, 5, 1, literals(OK_HEADERS + trailers + [("x-request-id", "r1")]))) as url:
        response = call(url)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.pop("httpStatus") == "" or status != 499
    assert error == {"grpcCode": code, "httpCode": status, "message": "нет 100%", "details": []}
    assert response.headers["Retry-After"] == "7" and response.headers["X-Request-Id"] == "r1"


def test_a_balancers_page_comes_as_it_is():
    page = frame(1, 4, 1, literals([(":status", "502"), ("content-type", "text/html")])) + frame(
        0, 1, 1, b"<h1>502"
    )
    with peer(page) as url:
        response = call(url)
    assert (response.status_code, response.text) == (502, "<h1>502")
    assert response.headers["Content-Type"] == "text/html"


def test_what_goes_out():
    sent = {}

    def script(client):
        client.preface()
        sent["settings"] = client.until(4)[3]
        client.send(SETTINGS)
        block = client.until(1)[3]
        found = client.frame()
        while found[0] != 0:
            block, found = block + (found[3] if found[0] == 9 else b""), client.frame()
        sent["headers"] = yandex_gpt._hpack_headers(block)
        sent["body"] = found[3]
        client.send(h2_answer(TASK))
        client.file.read()

    headers = {"Authorization": "Bearer " + "t" * 9_000, "X-Folder-Id": "f", "Connection": "keep-alive",
               "Accept-Encoding": "gzip", "Host": "other", "User-Agent": "us", "Idempotency-Key": "k"}  # fmt: skip
    with peer(script) as url:
        assert call(url, body={"tuningTaskId": "t1"}, headers=headers, timeout=9.5).ok
    assert (
        struct.pack(">HI", 1, 0) in sent["settings"]
        and struct.pack(">HI", 2, 0) in sent["settings"]
    )
    assert sent["body"] == b"\0\0\0\0\4\x0a\2t1"
    timeout = sent["headers"].pop("grpc-timeout")
    assert timeout[-1] == "m" and 9000 < int(timeout[:-1]) <= 9501
    assert sent["headers"] == {
        ":method": "POST", ":scheme": "http", ":path": "/" + DESCRIBE, ":authority": url[7:], "te": "trailers",
        "content-type": "application/grpc", "grpc-accept-encoding": "identity", "x-folder-id": "f",
        "authorization": headers["Authorization"], "user-agent": "us", "idempotency-key": "k",
    }  # fmt: skip


def test_headers_that_no_frame_holds_are_refused():
    with peer(h2_answer(TASK)) as url, pytest.raises(ConfigError, match="headers"):
        call(url, headers={"Authorization": "t" * 20_000})


def test_no_timeout_no_header():
    with peer(h2_answer(TASK)) as url:
        assert call(url, timeout=None).ok


def test_nobody_listens():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(ConnectionFailed) as failure:
        call(url)
    assert isinstance(failure.value.__cause__, OSError) and not yandex_gpt._THREAD.exchange.sent


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with peer(h2_answer(TASK), socket.AF_INET6) as url:
            assert call(url.replace("::1", "[::1]")).ok
    except OSError:
        pytest.skip("no IPv6 here")


# --- TLS and proxies -------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    "(certificate, key) of localhost, signed by itself."
    openssl = shutil.which("openssl") or pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("tls")
    pem, key = folder / "cert.pem", folder / "key.pem"
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {pem}"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command.split() + names, check=True, capture_output=True)
    return pem, key


def tls_wrap(certificate, protocols=("h2",)):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return lambda sock: context.wrap_socket(sock, server_side=True)


def secure(url):
    return url.replace("grpc://127.0.0.1", "grpcs://localhost")


@pytest.mark.parametrize("verify", ["bundle", "folder", False])
def test_tls(certificate, verify, tmp_path):
    if verify == "bundle":
        verify = str(certificate[0])
    elif verify == "folder":
        shutil.copy(certificate[0], tmp_path / "cert.pem")
        subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)
        verify = str(tmp_path)
    with peer(h2_answer(TASK), wrap=tls_wrap(certificate)) as url:
        assert call(secure(url), verify=verify).ok


@pytest.mark.parametrize("name, verify", [("localhost", True), ("127.0.0.1", "bundle")])
def test_untrusted_certificates_are_refused(certificate, name, verify):
    verify = str(certificate[0]) if verify == "bundle" else verify
    with peer(h2_answer(TASK), wrap=tls_wrap(certificate)) as url:
        with pytest.raises(ConnectionFailed, match="verify=") as failure:
            call(url.replace("grpc://127.0.0.1", f"grpcs://{name}"), verify=verify)
    assert failure.value.retry is False and isinstance(failure.value.__cause__, ssl.SSLError)
    assert not yandex_gpt._THREAD.exchange.sent


@pytest.mark.parametrize("protocols", [(), ("http/1.1",)])
def test_tls_without_http2(certificate, protocols):
    with (
        peer(h2_answer(TASK), wrap=tls_wrap(certificate, protocols)) as url,
        pytest.raises(ConnectionFailed),
    ):
        call(secure(url), verify=str(certificate[0]))


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_wrong_verify(tmp_path, content, certificate):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    with (
        peer(h2_answer(TASK), wrap=tls_wrap(certificate)) as url,
        pytest.raises(ConfigError, match="verify="),
    ):
        call(secure(url), verify=str(path))


def test_tls_handshake_that_never_ends():
    with peer(silent) as url, pytest.raises(DeadlineExceeded):
        call(secure(url), timeout=0.2)


def proxy_script(target, seen, reply=b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\n"):
    def script(client):
        for line in iter(client.file.readline, b"\r\n"):
            seen.append(line)
        client.send(reply)
        if b" 200 " not in reply:
            return
        host, port = target.split("//")[1].rsplit(":", 1)
        with socket.create_connection((host, int(port))) as upstream:

            def back():
                with contextlib.suppress(OSError):
                    while data := upstream.recv(65536):
                        client.send(data)

            thread = threading.Thread(target=back, daemon=True)
            thread.start()
            with contextlib.suppress(OSError):
                while data := client.sock.recv(65536):
                    upstream.sendall(data)

    return script


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_proxy(certificate, scheme):
    seen = []
    tls = scheme == "grpcs"
    with peer(h2_answer(TASK), wrap=tls_wrap(certificate) if tls else None) as url:
        with peer(proxy_script(url, seen)) as proxy:
            proxies = {
                "https" if tls else "http": proxy.replace("grpc://", "http://us%40er:se%2Fcret@")
            }
            assert call(secure(url) if tls else url, verify=str(certificate[0]), proxies=proxies).ok
    assert (
        seen[0] == f"CONNECT {(secure(url) if tls else url).split('//')[1]} HTTP/1.1\r\n".encode()
    )
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"us@er:se/cret") + b"\r\n" in seen


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"", b"junk\r\n\r\n", b"x" * 70_000],
)
def test_proxy_that_refuses(reply):
    seen = []
    with (
        peer(proxy_script("", seen, reply)) as proxy,
        pytest.raises(ConnectionFailed, match="proxy|closed") as failure,
    ):
        call(
            "grpc://example.invalid:1",
            proxies={"http": proxy.replace("grpc://", "http://user:secret@")},
        )
    assert "secret" not in repr(failure.value) + str(failure.value.__cause__)
    assert not yandex_gpt._THREAD.exchange.sent


@pytest.mark.parametrize(
    "proxy", ["socks5://user:secret@127.0.0.1:1", "http://user:secret/x@127.0.0.1:1"]
)
def test_proxy_of_another_kind(proxy):
    with pytest.raises(ConfigError, match="http://host:port") as failure:
        call("grpcs://example.invalid:1", proxies={"https": proxy})
    assert "secret" not in str(failure.value)


# --- grpcio and nginx ------------------------------------------------------------


@pytest.fixture(scope="session")
def official(certificate):
    "grpcio with Yandex's generated service classes: {'grpc': port, 'grpcs': port}, and what it saw."
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    seen, rng = [], Random(3)
    server = grpc.server(ThreadPoolExecutor(4))
    for name, methods in SERVICES.items():
        stubs = importlib.import_module(name + "_pb2_grpc")
        pb2 = importlib.import_module(name + "_pb2")
        for service in pb2.DESCRIPTOR.services_by_name.values():
            if service.name != ONLY.get(name.rpartition(".")[2], service.name):
                continue

            def handler(descriptor):
                def handle(self, request, context):
                    metadata = dict(context.invocation_metadata())
                    if metadata.get("x-fail"):
                        context.set_trailing_metadata((("retry-after", "3"),))
                        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "квота: 10 % used")
                    reply = rng.fill(message_class(descriptor.output_type)())
                    if metadata.get("x-large"):
                        reply.tuning_task.name = "x" * 3_000_000
                    context.send_initial_metadata((("x-request-id", "r-1"),))
                    seen.append((request, reply, metadata, context.time_remaining()))
                    return reply

                return handle

            servicer = type("S", (getattr(stubs, service.name + "Servicer"),),
                            {m: handler(service.methods_by_name[m]) for m in methods})  # fmt: skip
            getattr(stubs, f"add_{service.name}Servicer_to_server")(servicer(), server)
    ports = {"grpc": server.add_insecure_port("127.0.0.1:0")}
    pem, key = (path.read_bytes() for path in certificate)
    ports["grpcs"] = server.add_secure_port(
        "localhost:0", grpc.ssl_server_credentials([(key, pem)])
    )
    server.start()
    yield ports, seen
    server.stop(None)


@pytest.fixture(scope="session")
def nginx(official, certificate, tmp_path_factory):
    "nginx's grpc_pass before that server: {'grpc': port, 'grpcs': port}."
    binary = (
        shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin") or pytest.skip("no nginx")
    )
    folder = tmp_path_factory.mktemp("nginx")
    ports = {}
    for scheme in ("grpc", "grpcs"):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            ports[scheme] = sock.getsockname()[1]
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{ }}
        http {{
            access_log off; client_max_body_size 0; {temporary}
            server {{
                listen 127.0.0.1:{ports["grpc"]} http2;
                listen 127.0.0.1:{ports["grpcs"]} ssl http2;
                ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]};
                location / {{ grpc_pass grpc://127.0.0.1:{official[0]["grpc"]}; }}
                location /yandex.cloud.operation.OperationService/Cancel {{ return 502; }}
            }}
        }}""")
    process = subprocess.Popen([binary, "-p", str(folder), "-c", "nginx.conf", "-e", f"{folder}/error.log"],
                               stdin=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(500):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", ports["grpc"]), 1).close()
                break
            process.poll() is None or pytest.fail((folder / "error.log").read_text())
            time.sleep(0.01)
        yield ports
    finally:
        process.terminate()
        process.wait(5)


def endpoint(ports, scheme):
    return f"{scheme}://{'localhost' if scheme == 'grpcs' else '127.0.0.1'}:{ports[scheme]}"


@pytest.mark.parametrize("front", ["official", "nginx"])
@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_every_method_against_other_software(front, scheme, official, certificate, request):
    json_format = pytest.importorskip("google.protobuf.json_format")
    ports = official[0] if front == "official" else request.getfixturevalue("nginx")
    url, rng = endpoint(ports, scheme), Random(4)
    for name, method in official_methods():
        if front == "nginx" and name.endswith("OperationService/Cancel"):
            continue
        body = json_format.MessageToDict(rng.fill(message_class(method.input_type)()))
        response = call(
            url, name, body, headers={"Authorization": "Api-Key k"}, verify=str(certificate[0])
        )
        assert response.status_code == 200, response.text
        got, reply, metadata, left = official[1].pop()
        assert plain(json_format.MessageToDict(got)) == plain(
            json_format.MessageToDict(
                json_format.ParseDict(body, message_class(method.input_type)())
            )
        )
        assert response.json() == json.loads(plain(json_format.MessageToDict(reply)))
        assert metadata["authorization"] == "Api-Key k"
        assert 3 < left <= 5.1
        assert response.headers["x-request-id"] == "r-1"


@pytest.mark.parametrize("front", ["official", "nginx"])
def test_large_messages_and_errors(front, official, request):
    ports = official[0] if front == "official" else request.getfixturevalue("nginx")
    url = endpoint(ports, "grpc")
    response = call(url, body={"tuningTaskId": "я" * 1_000_000}, headers={"x-large": "1"})
    assert len(response.json()["tuningTask"]["name"]) == 3_000_000
    assert len(official[1].pop()[0].tuning_task_id) == 1_000_000
    response = call(url, headers={"x-fail": "1"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json() == {"error": {"grpcCode": 8, "httpCode": 429, "message": "квота: 10 % used",
                                         "httpStatus": "Too Many Requests", "details": []}}  # fmt: skip


def test_nginx_own_error_page(nginx):
    response = call(endpoint(nginx, "grpc"), "yandex.cloud.operation.OperationService/Cancel")
    assert response.status_code in (502, 503)


def test_the_official_server_refuses_default_verify(official):
    with pytest.raises(ConnectionFailed, match="verify="):
        call(endpoint(official[0], "grpcs"))


def test_threads_share_an_adapter(official):
    from concurrent.futures import ThreadPoolExecutor

    url = endpoint(official[0], "grpc")
    with ThreadPoolExecutor(8) as pool:
        assert all(response.ok for response in pool.map(lambda _: call(url), range(32)))


def test_mounted_on_a_session(official):
    session = requests.Session()
    session.mount("grpc://", yandex_gpt._GRPCAdapter())
    yandex_gpt._THREAD.exchange = types.SimpleNamespace(deadline=yandex_gpt._Deadline(5), sent=False)
    assert session.post(f"{endpoint(official[0], 'grpc')}/{DESCRIBE}", json={}).ok
    session.close()


# --- Sweeps ---------------------------------------------------------------------------------------


def public_values() -> list[Any]:
    client = ClientConfig("b1g", "AQVNsecret", retry=RetryConfig(3))
    model = Model("m", client=client, config=ModelConfig(tools=[weather], response_format=City))
    operation = model.attach_deferred("abc")
    errors = [getattr(yandex_gpt, name)("said", request_id="r") for name in yandex_gpt.__all__
              if isinstance(getattr(yandex_gpt, name), type) and issubclass(getattr(yandex_gpt, name), YandexGPTError)]
    return [
        client, model, ChatModel("m", client=client), operation, model._with(uri="gpt://a/b"), *errors,
        PollTimeout("late", operation=operation), TextMessage("user", "x"), ToolCall("f", {"a": [1]}, "i"),
        FunctionTool.from_function(weather), Usage(1, 2, 3), Token(1, "a", True), Result((ANSWER,), Usage(1, 2, 3), "v"),
        OperationStatus(True, response={}), Dataset("id", labels={"a": "b"}), Lora(1), PromptTune(2), LinearScheduler(0.1),
        CosineScheduler(0.1), ConstantScheduler(0.1), AdamW(0.9), APIKeyAuth("k"), IAMTokenAuth("t"), EnvIAMTokenAuth(),
        OAuthTokenAuth("y0_x"), MetadataAuth(), YandexCloudCLIAuth("p"), NoAuth(), RetryConfig(), ModelConfig()]


@pytest.mark.parametrize("value", public_values(), ids=lambda value: type(value).__name__)
def test_every_public_value_pickles_and_copies(value: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert type(twin) is type(value)
        if isinstance(value, Exception):
            assert (str(twin), twin.__dict__.keys()) == (str(value), value.__dict__.keys())
        elif not isinstance(value, Operation):
            assert twin == value
            assert hash(twin) == hash(value)
    assert "AQVNsecret" not in repr(value)


def test_a_lambda_cannot_be_pickled_and_the_error_says_whose_it_is() -> None:
    with pytest.raises(pickle.PicklingError, match="auth"):
        pickle.dumps(ClientConfig(auth=lambda: "key"))
    with pytest.raises(pickle.PicklingError, match="tool"):
        pickle.dumps(Model("m", folder_id="b").configure(tools=[lambda city: city]))


def test_every_public_name_is_documented() -> None:
    for name in yandex_gpt.__all__:
        value = getattr(yandex_gpt, name)
        assert value.__doc__, name
        for member, function in vars(value).items() if isinstance(value, type) else ():
            if not member.startswith("_") and inspect.isfunction(function):
                assert function.__doc__, f"{name}.{member}"


def test_docstring_examples() -> None:
    assert doctest.testmod(yandex_gpt).failed == 0
