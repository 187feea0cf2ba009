"""The HTTP API against requests made from its own OpenAPI, good and bad: no 5xx, and no answer that it does not document."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.event_fixtures import make_prediction, send
from tests.web_fixtures import site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

__all__ = ["site"]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
WRITING = [("POST", path) for path in ("/v1/predictions", "/v1/labels", "/v1/reviews/{id}/answer", "/v1/reviews/{id}/skip")]
READING = [("GET", path) for path in ("/v1/events/{ulid}", "/v1/reviews", "/v1/reviews/next", "/v1/reviews/{id}")]


@pytest.mark.parametrize(("method", "path"), [*WRITING, *READING, ("POST", "/v1/reviews/{id}/reveal")])
def test_every_answer_is_a_documented_one(site, method, path):
    send(site.engine, [make_prediction(number, site.clock(), confidence=0.4) for number in range(3)], site.clock())
    site.handle()
    operation = schemathesis.openapi.from_asgi("/openapi.json", site.app)[path][method]
    modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(modes), name=st.sampled_from(["node", "ann", "ops"]))
    def check(case, name):
        case.call_and_validate(headers={"Authorization": f"Bearer {site.secrets[name]}"}, checks=CHECKS)

    check()
