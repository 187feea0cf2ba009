"""deploy/compose.yaml and deploy/prometheus.yml, held to what Ratchet really knows: variables, roles, ports, routes and commands."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from daemon import cli, clocks, config, service
from daemon.web import app
from daemon.web.metrics import Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"] == "ratchet"}
ROLES = {name: one["command"] for name, one in OURS.items() if "command" in one}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The configuration of `ratchet init` under the variables of the containers."""
    folder = tmp_path_factory.mktemp("home") / "home"
    assert CliRunner().invoke(cli.app, ["init", str(folder)]).exit_code == 0
    (environment,) = {tuple(sorted(one["environment"].items())) for one in OURS.values()}
    return config.load(folder / config.FILE, dict(environment))


def test_every_variable_is_a_setting(settings):
    assert settings.database.url == "postgresql+psycopg://ratchet@postgres/ratchet"
    assert settings.kafka.bootstrap == "kafka:9092"
    assert settings.server.host == "0.0.0.0"


def test_each_role_is_one_that_there_is_and_none_is_left_out():
    assert {command[2] for command in ROLES.values()} == set(service.ROLES)
    assert all(command[:2] == ["up", "--role"] for command in ROLES.values())
    assert (SERVICES["consume"]["deploy"]["replicas"], "deploy" in SERVICES["schedule"]) == (2, False)


def test_the_addresses_are_those_of_the_other_services(settings):
    host, port = settings.kafka.bootstrap.split(":")
    assert SERVICES[host]["environment"]["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{host}:{port}"
    database = SERVICES["postgres"]["environment"]
    user, _, place = settings.database.url.partition("://")[2].partition("@")
    assert (user, place) == (database["POSTGRES_USER"], f"postgres/{database['POSTGRES_DB']}")


def test_health_checks_and_prometheus_ask_routes_that_there_are(settings, engine):
    ops = httpx.ASGITransport(app.create_ops_app(engine, Metrics(engine, {}, clocks.read_local, {})))

    async def answers(path):
        async with httpx.AsyncClient(transport=ops, base_url="http://ratchet") as client:
            return (await client.get(path)).is_success

    for name in ROLES:
        asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", OURS[name]["healthcheck"]["test"][-1])
        assert int(asked[1]) == settings.server.ops_port
        assert asyncio.run(answers(asked[2]))
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert asyncio.run(answers(job["metrics_path"]))
    assert found["port"] == settings.server.ops_port
    assert set(found["names"]) == set(ROLES)
    assert SERVICES["web"]["ports"] == [f"127.0.0.1:{settings.server.port}:{settings.server.port}"]


def test_what_prepares_calls_commands_that_there_are():
    for command in re.findall(r"ratchet ([\w ]+?)(?: &&|$)", OURS["prepare"]["entrypoint"][-1]):
        assert CliRunner().invoke(cli.app, [*command.split(), "--help"]).exit_code == 0


def test_no_secret_stands_in_a_command_or_in_the_file():
    for one in SERVICES.values():
        assert "PASSWORD" not in str(one.get("command")) + str(one.get("entrypoint")) + str(one.get("healthcheck"))
        for name, value in one.get("environment", {}).items():
            if "PASSWORD" in name:
                assert value.startswith("${POSTGRES_PASSWORD:?")


def test_a_daemon_has_longer_to_stop_than_it_takes():
    assert all(int(one["stop_grace_period"].rstrip("s")) > service.STOP_SECONDS for one in OURS.values())


def test_the_image_is_made_of_files_that_are_there_and_sent():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    sent = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert copied
    for name in copied:
        assert (DEPLOY.parent / name).exists()
        assert f"!{name}" in sent
