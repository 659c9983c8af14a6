"""What schemathesis cannot know of this API."""

import os
import re

import schemathesis
from schemathesis.openapi.checks import EnsureResourceAvailability, RejectedPositiveData

# Rules between fields that no schema says, and values whose inside is for other readers: a request that the schema
# allows may be refused for these reasons and for no others. The pairs are an error's code and where it points.
UNSAID = [
    # Lengths in tokens, and what must lie within them.
    ("context_length_exceeded", r"messages|input|prompt"),
    ("out_of_range", r"min_tokens|logit_bias"),
    # A schema, a regex or a grammar of the client's that is none, or too large.
    ("invalid_schema", r".*"),
    ("string_above_max_length", r".*(parameters|schema|json)"),
    # Calls and their answers; names that stand for something elsewhere.
    ("invalid_value", r"messages\[\d+\]\.(tool_call_id|name|tool_calls(\[\d+\]\.id)?|function_call)"),
    ("invalid_value", r"(tools|functions)\[\d+\](\.function)?\.name|tool_choice|function_call"),
    ("invalid_value|empty_array", r"input"),
    ("previous_response_not_found", r"previous_response_id"),
    # One of several.
    ("invalid_value", r"structured_outputs.*|continue_final_message"),
    ("unsupported_value", r"best_of"),
    # What the model's own template refuses.
    ("invalid_value", r"messages"),
    # A header that goes with another, and a key that was used before.
    ("missing_required_parameter|idempotency_key_reused", r"Idempotency-Key"),
    # An operator's: times that have passed, ids of a page that are none, prices that must be meant,
    # addresses that nothing is sent to, events that are not among the dead letters.
    ("invalid_value", r"(expires|from)_unix_ms|after|before|prices\..*|url|id"),
    # To a schema 2.0 is whole; money must be written without a fraction.
    ("invalid_type", r".*_nano_usd"),
    # An event that is not there to go on behind.
    ("invalid_value", r"Last-Event-ID"),
    # A range of time that runs backwards, a page of another one, more buckets than there may be of that width.
    ("out_of_range", r"end_time|limit"),
    ("invalid_value", r"page"),
]


def is_without_webhook(failure, response):
    """A tenant begins without an endpoint for webhooks; that is not the tenant that cannot be found."""
    of_webhook = isinstance(failure, EnsureResourceAvailability) and "/{id}/webhook" in failure.not_available_with
    return of_webhook and response.json()["error"]["message"].startswith("No webhook found")


@schemathesis.hook
def filter_failure(context, failure, case, response):
    if is_without_webhook(failure, response):
        return False
    if not isinstance(failure, RejectedPositiveData) or response.status_code not in (400, 422):
        return True
    error = response.json()["error"]
    code, param = error["code"], error["param"] or ""
    return not any(re.fullmatch(codes, code) and re.fullmatch(place, param) for codes, place in UNSAID)


# A time that has not passed.
LATER_UNIX_MS = 4_102_444_800_000


def of_operator(case):
    """Asks for things that there are: a key that conformance.py made, and times to come."""
    path = case.operation.path
    if path.startswith("/v1/admin/keys/{id}") and case.operation.method.upper() != "DELETE":
        case.path_parameters["id"] = os.environ["LIGHTCONE_TEST_KEY"]
    if isinstance(case.body, dict):
        for name in ("expires_unix_ms", "from_unix_ms"):
            if isinstance(case.body.get(name), (int, float)):
                case.body[name] = max(case.body[name], LATER_UNIX_MS)


@schemathesis.hook
def before_call(context, case, kwargs):
    """What is to be found again later must be stored."""
    if "LIGHTCONE_TEST_KEY" in os.environ and case.meta is not None and case.meta.generation.mode.is_positive:
        of_operator(case)
    stateful = case.meta is not None and case.meta.phase.name.value == "stateful"
    if stateful and case.operation.label.startswith("POST ") and isinstance(case.body, dict):
        if case.meta.generation.mode.is_positive and {"messages", "input"} & case.body.keys():
            case.body["store"] = True
