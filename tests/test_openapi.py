"""The OpenAPI document: valid by its standard, complete, and kept by a real server whatever schemathesis sends.

Every operation is driven with data that fits the document and with data that doesn't, open and with tokens, on a
pool that has keys to offer. Seeds are fixed: derandomized, so that a failure comes again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import validate
from support import ADMIN_TOKEN, API, OF_POOLS, ROUTES, Client, ServerProcess

from keypool.api.bodies import MOST_SECONDS
from keypool.api.first_version import LEGACY
from keypool.api.openapi import describing, document
from keypool.api.operations import OPERATIONS

EXAMPLES = 15  # of each operation, in each of the two modes, on each of the two servers
LONGEST_WAIT = 0.02

NOT_FOR: dict[str, set[str]] = {
    # Parameters that fit alone may make no sense together (prefix with order), and `after` fits by its length but is
    # a cursor only if the server made it: 400, and the document has no way to say so.
    "list": {"positive_data_acceptance"},
    "history": {"positive_data_acceptance"},
    "owners": {"positive_data_acceptance", "negative_data_rejection"},  # a cursor that is far too long is 414
    "waiters": {"positive_data_acceptance"},
    "events": {"positive_data_acceptance"},
    # Characters that aren't allowed.
    "owners-release": {"positive_data_acceptance"},
    # Members that fit alone may make no sense together: `retry_after` with an `outcome` other than rate_limited, an
    # `outcome` or an extend without a lease number.
    "unblock": {"positive_data_acceptance"},
    "extend": {"positive_data_acceptance"},
    "batch": {"positive_data_acceptance"},
    # A name without a `secret`, a `now` without `drain`, a `max_block_seconds` below the `block_seconds`.
    "generate": {"positive_data_acceptance"},
    "pool-delete": {"positive_data_acceptance"},
    "pool-put": {"positive_data_acceptance"},
    "pool-change": {"positive_data_acceptance"},
    # Lengths in bytes, and characters that aren't allowed.
    "replace": {"positive_data_acceptance"},
    "update": {"positive_data_acceptance"},
    # The first version's 400 for an unknown key, which its clients compare: any key that is made up is unknown.
    "legacy-unblock": {"positive_data_acceptance"},
    "legacy-delete": {"positive_data_acceptance"},
}
# The pages and the document take no notice of a query or a body that they don't have: nothing there can be refused.
TAKES_ANYTHING = {"health", "ready", "metrics"}
# A websocket: a later test asks it what a plain GET is answered; the rest is the feed's own tests'.
NOT_DRIVEN = {"feed"}
# Under the path of a pool: the same operations, on a pool that isn't there if its name is made up.
IN_POOL = "-in-pool"


def operations(doc: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Path, method and name of each operation."""
    for path, methods in doc["paths"].items():
        for method, described in methods.items():
            yield path, method.upper(), described["operationId"]


CALLS = (*OPERATIONS, *LEGACY)
DOCUMENT = document((*CALLS, describing(CALLS, open=False)), open=False)
NAMES = [
    name
    for _, _, name in operations(DOCUMENT)
    if name not in NOT_DRIVEN and (name == "stats-in-pool" or not name.endswith(IN_POOL))
]


# -------------------------------------------------------------------------------------------------- the document


def test_it_is_valid_by_the_standard_open_and_with_tokens(
    client: Client, guarded_server: ServerProcess
) -> None:
    """For anyone, with no token shown; security is there only where tokens are."""
    for asked in (client, guarded_server.client()):
        doc = asked.get(API + "/openapi.json").expect(200)
        validate(doc)
        assert doc["openapi"].startswith("3.1")
        secured = [
            name for path in doc["paths"].values() for name, each in path.items() if each.get("security")
        ]
        assert bool(secured) is (asked is not client)


def test_public_operations_have_an_empty_security() -> None:
    """`security: []`, on a server with tokens: nothing left out, from which a reader could conclude either."""
    of = {
        each["operationId"]: each["security"] for path in DOCUMENT["paths"].values() for each in path.values()
    }
    assert {name for name, security in of.items() if security == []} == {"openapi", "health", "ready"}
    assert all(security in ([], [{"token": []}]) for security in of.values())


def test_answers_of_batches_are_discriminated_by_op() -> None:
    """One of several, by the member that each answer begins with: a generated client reads unblock's `stale`."""
    responses = DOCUMENT["paths"][f"{API}/batch"]["post"]["responses"]
    schema = responses["200"]["content"]["application/json"]["schema"]
    assert schema["discriminator"]["propertyName"] == "op"
    mapping = schema["discriminator"]["mapping"]
    assert set(mapping) == {
        *("import", "acquire", "keepalive", "unblock", "extend", "delete", "quarantine", "restore"),
    }
    assert [option["$ref"] for option in schema["oneOf"]] == list(mapping.values())
    components = DOCUMENT["components"]["schemas"]
    for op, ref in mapping.items():
        described = components[ref.rpartition("/")[2]]
        assert described["properties"]["op"] == {"enum": [op]}
        assert "op" in described["required"]
    assert "stale" in components[mapping["unblock"].rpartition("/")[2]]["required"]


def test_acquires_take_an_idempotency_key() -> None:
    """The single one and the batch: the request's header, and the answer's that says that it repeats leases."""
    takers = {
        each["operationId"]
        for path in DOCUMENT["paths"].values()
        for each in path.values()
        if any(one["name"] == "Idempotency-Key" for one in each.get("parameters", ()))
    }
    assert takers == {"acquire", "acquire-in-pool", "batch", "batch-in-pool"}
    answers = DOCUMENT["paths"][f"{API}/keys/acquire"]["post"]["responses"]
    assert "Idempotent-Replayed" in answers["200"]["headers"]
    assert "superseded" in answers["409"]["description"]


def test_examples_fit_their_schemas() -> None:
    """Each is what its operation takes: it is decoded by the types of the bodies."""
    examples = {
        each["operationId"].removesuffix(IN_POOL): each["requestBody"]["content"]["application/json"][
            "example"
        ]
        for path in DOCUMENT["paths"].values()
        for each in path.values()
        if "requestBody" in each
    }
    bodies = {operation.name: operation.body for operation in OPERATIONS if operation.body is not None}
    assert set(examples) == set(bodies)
    for name, example in examples.items():
        msgspec.convert(example, bodies[name])


def test_the_paths_of_a_pool_have_the_operations_of_default() -> None:
    """The same schemas, which stand in the document once, and one more parameter."""
    paths = DOCUMENT["paths"]
    for path, described in paths.items():
        for method, each in described.items():
            if each["operationId"].endswith(IN_POOL):
                pool, *others = each["parameters"]
                assert pool["name"] == "pool"
                there = paths[path.replace("/pools/{pool}", "")][method]
                assert there["responses"] == each["responses"]
                assert there.get("requestBody") == each.get("requestBody")
                assert there.get("parameters", []) == others


def test_moments_are_dates() -> None:
    """RFC 3339, which a generated client reads as such."""
    row = DOCUMENT["components"]["schemas"]["Row"]
    assert row["properties"]["created_at"] == {"type": "string", "format": "date-time"}


def test_it_has_every_path_and_method_and_no_other(client: Client) -> None:
    """Those that the contract has; the first version's paths stand there once, without the slash."""
    doc = client.get(API + "/openapi.json").expect(200)
    described: dict[str, set[str]] = {}
    for path, method, _ in operations(doc):
        described.setdefault(path, set()).add(method)
    wanted = {path: methods - {"HEAD"} for path, methods in {**ROUTES, **OF_POOLS}.items()}
    for path in [path for path in wanted if path + "/" in wanted]:
        del wanted[path + "/"]
    assert described == wanted | {API + "/feed": {"GET"}, API + "/pools/{pool}/feed": {"GET"}}


def test_every_call_names_the_errors_of_its_own() -> None:
    """What operations.py says that a call is refused with stands among its answers."""
    by_name = {each["operationId"]: each for path in DOCUMENT["paths"].values() for each in path.values()}
    for operation in CALLS:
        described = " ".join(each["description"] for each in by_name[operation.name]["responses"].values())
        for error in operation.errors:
            assert error.code in described, f"{operation.name} does not name {error.code}"


# ----------------------------------------------------------------------------------------------------- driven


@pytest.fixture(params=["open", pytest.param("tokens", marks=pytest.mark.thorough)])
def driven(
    request: pytest.FixtureRequest, server: ServerProcess, guarded_server: ServerProcess
) -> Iterator[tuple[ServerProcess, requests.Session]]:
    """A server with a few keys, and a session that may do everything there."""
    guarded = request.param == "tokens"
    server = guarded_server if guarded else server
    session = requests.Session()
    session.trust_env = False
    if guarded:
        session.headers["Authorization"] = f"Bearer {ADMIN_TOKEN}"
    with server.client(ADMIN_TOKEN if guarded else None) as client:
        client.make_many(5)
    yield server, session
    session.close()
    purge_all(server, ADMIN_TOKEN if guarded else None)


def purge_all(server: ServerProcess, token: str | None) -> None:
    """Delete what was made by calls that no client of ours has seen the answers of."""
    with server.client(token) as client:
        while rows := client.get(API + "/keys?limit=500").expect(200)["keys"]:
            client.batch(op="delete", keys=[f"id:{row['id']}" for row in rows]).expect(200)
        for pool in client.get(API + "/pools").expect(200)["pools"]:
            if pool["name"] != "default":
                client.delete(f"{API}/pools/{pool['name']}?drain=true&now=true")


def hurry(case: Any) -> None:
    """Waits that are allowed are made short, and blocks as this pool allows: the answer's form doesn't change by it."""
    body: Any = case.body
    if isinstance(body, dict) and type(body.get("wait")) in (int, float) and 0 < body["wait"] <= 60:
        body["wait"] = min(body["wait"], LONGEST_WAIT)
    block: Any = body.get("block_seconds") if isinstance(body, dict) else None
    if type(block) in (int, float) and 0 < block <= MOST_SECONDS:
        body["block_seconds"] = min(max(block, 1), 60)  # the limits are the pool's
    if isinstance(body, dict) and body.get("op") == "generate" and type(body.get("count")) is int:
        body["count"] = min(body["count"], 3) if body["count"] > 0 else body["count"]


QUICK = {
    *(
        "generate",
        "acquire",
        "batch",
        "extend",
        "list",
        "quarantine",
        "unblock",
        "find",
        "update",
        "pool-put",
    ),
}


@pytest.mark.parametrize("mode", ["fitting", pytest.param("not fitting", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in NAMES]
)
def test_the_server_keeps_to_its_document(
    driven: tuple[ServerProcess, requests.Session], name: str, mode: str
) -> None:
    """No finding: statuses, headers, types and schemas are as described, what fits is taken, what doesn't isn't."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own dependencies deprecate
        import schemathesis  # takes a second
        from schemathesis.checks import CHECKS, load_all_checks

        load_all_checks()
    server, session = driven
    url = f"http://{server.host}"
    doc = session.get(f"{url}{API}/openapi.json", timeout=30).json()
    schema = schemathesis.openapi.from_dict(doc)
    operation = schema.find_operation_by_id(name)
    if mode != "fitting" and (name in TAKES_ANYTHING or not can_be_wrong(operation)):
        pytest.skip("it takes no input that could be wrong")
    modes = schemathesis.GenerationMode
    generated = modes.POSITIVE if mode == "fitting" else modes.NEGATIVE
    checks: Any = [check for check in CHECKS.get_all() if check.__name__ not in NOT_FOR.get(name, set())]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=generated))
    def drive(case: Any) -> None:
        hurry(case)
        case.call_and_validate(base_url=url, session=session, checks=checks, timeout=30)

    drive()


def can_be_wrong(operation: Any) -> bool:
    """Whether any input doesn't fit: any text may be a key in a path."""
    return bool(operation.query or operation.body)


def test_pages_have_the_types_of_the_document(server: ServerProcess) -> None:
    """The type of each, and HEAD as GET."""
    for path in ("/healthz", "/readyz", "/metrics"):
        for method in ("GET", "HEAD"):
            answer = requests.request(method, f"http://{server.host}{path}", timeout=30)
            assert answer.status_code == 200, answer.text
            described = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]
            assert list(described) == [answer.headers["Content-Type"].partition(";")[0]]


def test_a_whole_number_may_be_written_with_a_point(client: Client) -> None:
    """JSON Schema, and JavaScript, make no difference between 2 and 2.0; what is no whole number is refused."""
    assert len(client.batch(op="generate", count=2.0).expect(201)["keys"]) == 2
    lease = client.acquire(wait=1.0)
    path = f"{API}/keys/{lease['key']}/unblock"
    client.post(path, json={"lease": lease["lease"] + 0.5}).expect_problem(400, "bad-request")
    assert client.post(path, json={"lease": float(lease["lease"])}).expect(200)["changed"] is True
    client.batch(op="generate", count=1e30).expect_problem(400, "bad-request")
