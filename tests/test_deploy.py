"""The files under deploy/: each is checked by its own tool where that is installed, and read here as far as it goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from keypool.api.bodies import MAX_WAIT
from keypool.config.limits import MAX_IMPORT, Limits
from keypool.config.settings import OPTIONS

DEPLOY = Path(__file__).parents[1] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
UNIT = DEPLOY / "systemd" / "keypool.service"
NGINX = DEPLOY / "nginx" / "keypool.conf"
CADDY = DEPLOY / "caddy" / "Caddyfile"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "docker" / "compose.yaml"


def tool(name: str) -> str:
    """The path of a program, /usr/sbin included; skips where there is none."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> str:
    """What a command prints; fails unless it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Without a word of complaint, and as well protected as it is said to be."""
    unit = tmp_path / "keypool.service"
    text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text())
    unit.write_text(re.sub(r"\nDocumentation=.*", "", text))
    assert "keypool.service" not in run(tool("systemd-analyze"), "verify", str(unit))
    done = run(tool("systemd-analyze"), "security", "--offline=true", "--threshold=20", str(unit))
    assert "overall exposure level" in done.lower()


def test_the_unit_lets_the_server_see_itself_and_go_on() -> None:
    """/proc whole enough for process_* metrics; no limit of restarts, no stop for a child that memory ran out on."""
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert settings.get("ProcSubset", "all") == "all"
    assert settings["StartLimitIntervalSec"] == "0"
    assert settings["OOMPolicy"] == "continue"
    assert settings["ExecReload"] == "kill -HUP $MAINPID"
    assert "time-sync.target" in settings["After"].split()


def test_the_unit_waits_as_long_as_the_server_takes() -> None:
    """To stop, longer than --drain-seconds; it isn't started again for a wrong setting."""
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    drain = next(option.default for option in OPTIONS if option.name == "drain_seconds")
    assert isinstance(drain, float)
    assert settings["Type"] == "notify"
    assert int(settings["TimeoutStopSec"]) > drain
    assert settings["RestartPreventExitStatus"] == "2"
    assert int(settings["LimitNOFILE"]) > Limits().connections
    stop_grace = re.search(r"stop_grace_period: (\d+)s", COMPOSE.read_text())
    assert stop_grace is not None
    assert int(stop_grace[1]) > drain


def test_nginx_takes_the_configuration(tmp_path: Path) -> None:
    """With a certificate made for it."""
    nginx, openssl = tool("nginx"), tool("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    run(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=keys.example.com",
        "-keyout", str(key), "-out", str(certificate))  # fmt: skip
    text = NGINX.read_text().replace("/var/log/nginx", str(tmp_path))
    text = text.replace("/etc/ssl/keypool/fullchain.pem", str(certificate))
    (tmp_path / "keypool.conf").write_text(text.replace("/etc/ssl/keypool/privkey.pem", str(key)))
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}} http {{ include {tmp_path}/keypool.conf; }}"
    )
    assert "successful" in run(nginx, "-t", "-c", str(main))


def test_caddy_takes_the_configuration() -> None:
    """Where there is a caddy."""
    run(tool("caddy"), "validate", "--adapter", "caddyfile", "--config", str(CADDY))


def promtool(*arguments: str | Path) -> None:
    """Run promtool; where the tests are to be believed, it has to be there."""
    if os.environ.get("CI") == "true" and shutil.which("promtool") is None:
        pytest.fail("promtool is not installed, and CI=true says that it has to be (Debian: prometheus)")
    run(tool("promtool"), *map(str, arguments))


@pytest.mark.thorough
def test_each_alert_fires_on_its_history_and_on_no_healthy_one() -> None:
    """By Prometheus itself; no alert is without a history that it fires on."""
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")
    alerts = re.findall(r"- alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())
    fired = set(re.findall(r'alertname="(\w+)"', (PROMETHEUS / "alerts_test.yml").read_text()))
    assert fired == set(alerts)


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-many.yml"])
def test_prometheus_takes_the_configuration(name: str, tmp_path: Path) -> None:
    """Rules included; alerts go to the Alertmanager that compose starts."""
    text = (PROMETHEUS / name).read_text()
    assert re.search(r"alerting:\n.*alertmanager:9093", text, re.DOTALL)
    assert re.search(r"^  alertmanager:$", COMPOSE.read_text(), re.MULTILINE)
    token = tmp_path / "viewer-token"
    token.write_text("x")
    (tmp_path / name).write_text(text.replace("/run/secrets/viewer-token", str(token)))
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    promtool("check", "config", tmp_path / name)


def test_proxies_wait_longer_than_an_acquire_and_keep_connections_shorter_than_the_server() -> None:
    """Else they cut long polls, or send a request on a connection that is just being closed."""
    nginx, caddy = NGINX.read_text(), CADDY.read_text()
    for pattern, text in ((r"proxy_read_timeout (\d+)s", nginx), (r"response_header_timeout (\d+)s", caddy)):
        assert int(re.findall(pattern, text)[0]) > MAX_WAIT, pattern
    kept = r"upstream keypool \{[^}]*keepalive_timeout (\d+)s", r"keepalive (\d+)s"
    for pattern, text in zip(kept, (nginx, caddy), strict=True):
        assert int(re.findall(pattern, text, re.DOTALL)[0]) < Limits().idle_seconds, pattern
    assert f"client_max_body_size {MAX_IMPORT // 1024**2}m;" in nginx
    assert "$http_upgrade" in nginx


def test_nginx_logs_no_target() -> None:
    """A key may stand in a path. (Both proxies are run, and their logs read, in test_proxies.py.)"""
    assert not re.search(
        r"\$(request|request_uri|uri|args)\b", re.findall(r"log_format[^;]*;", NGINX.read_text())[0]
    )
    assert re.search(r"error_log \S+ crit;", NGINX.read_text())


def test_the_image_is_slim_and_runs_without_root() -> None:
    """Two stages, no root, a health check without a shell, and only files that there are."""
    text = DOCKERFILE.read_text()
    assert len(re.findall(r"^FROM python:[\d.]+-slim", text, re.MULTILINE)) == 2
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert re.search(r'HEALTHCHECK(?s:.)*?CMD \["python"', text)
    for source in re.findall(r"^COPY (\w[\w.]*) ", text, re.MULTILINE):
        assert (DEPLOY.parent / source).exists(), source
    variables = {option.variable for option in OPTIONS}
    named = set(re.findall(r"KEYPOOL_\w+(?==)", text))
    assert named <= variables, named - variables


def test_compose_mounts_files_that_there_are() -> None:
    """Every path of the repository that it names, but the secrets, which the user makes."""
    for path in re.findall(r"\.\./[\w./-]+", COMPOSE.read_text()):
        assert (COMPOSE.parent / path).exists(), path


def test_many_processes_are_settings_that_there_are() -> None:
    """Each variable that compose names is a setting, and Prometheus scrapes the ports that the processes get."""
    text = (DEPLOY / "docker" / "many.yaml").read_text()
    given = dict(re.findall(r"^ +(KEYPOOL_\w+): \"?([^\"\n]+)", text, re.MULTILINE))
    assert given.keys() <= {option.variable for option in OPTIONS}
    first, count = int(given["KEYPOOL_PROCESS_PORT"]), int(given["KEYPOOL_PROCESSES"])
    scraped = re.findall(r"keypool:(\d+)", (DEPLOY / "prometheus" / "prometheus-many.yml").read_text())
    assert [int(port) for port in scraped] == list(range(first, first + count))
    assert "noeviction" in text
    assert "grep -q PONG" in text, (
        "a Valkey that loads answers a ping with LOADING, and valkey-cli ends with 0"
    )


def test_containers_can_read_the_secrets_that_they_mount() -> None:
    """By a group: Compose mounts a secret with the host's owner and mode, whatever user runs inside."""
    services = re.findall(r"^  \w+:\n(?:    .*\n)+", COMPOSE.read_text(), re.MULTILINE)
    with_secrets = [service for service in services if "    secrets:" in service]
    assert len(with_secrets) == 2
    assert all('    group_add: ["10001"]' in service for service in with_secrets)
    assert "chgrp 10001" in (DEPLOY / "README.md").read_text()
