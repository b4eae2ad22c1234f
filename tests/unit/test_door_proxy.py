"""What Serve's proxy says of itself becomes the door's words; what a replica says stays as it is."""

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.testclient import TestClient

from edit_ray.server.proxy_answers import CALLBACK, ProxyAnswers, middlewares


def asked(application, path="/v1/videos/one"):
    return TestClient(ProxyAnswers(application), raise_server_exceptions=False).get(path)


async def dead(scope, receive, send):
    """As Ray Serve's proxy ends where a replica has died under a request; uvicorn makes a 500 of it."""


OF_THE_PROXY = {
    "dead": dead,
    "broken": PlainTextResponse("Internal Server Error", 500),
    "no route": PlainTextResponse("Path '/v1/videos/one' not found.", 404),
    "no replica": PlainTextResponse("Deployment is unavailable.", 503),
}


@pytest.mark.parametrize("application", OF_THE_PROXY.values(), ids=OF_THE_PROXY)
def test_what_the_proxy_says_can_be_asked_again(application):
    answer = asked(application)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    "application",
    [JSONResponse({}, 404), JSONResponse({}, 500), Response(b"moov", 200, media_type="video/mp4"), Response(None, 204)],
)
def test_what_a_replica_says_stays(application):
    answer = asked(application)
    assert (answer.status_code, answer.content) == (application.status_code, application.body)
    assert "Retry-After" not in answer.headers


def test_a_path_that_is_not_the_doors_is_let_alone():
    assert asked(OF_THE_PROXY["no route"], "/another/application").status_code == 404


def test_serve_finds_it_by_its_name():
    assert CALLBACK == "edit_ray.server.proxy_answers:middlewares"
    assert [middleware.cls for middleware in middlewares()] == [ProxyAnswers]
