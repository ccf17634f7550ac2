"""Secrets are told from what merely looks like them, and are kept out of messages."""

from __future__ import annotations

import pytest

from vssl_dist.confidential import (
    has_secret_in_address,
    has_secret_in_command,
    is_secret_variable,
    redact_secrets,
)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:hunter2@host:5000", "HTTP://me:hunter2@host", "http:/me:hunter2@host",
        "http:///me:hunter2@host", r"http:\\me:hunter2@host", "//me:hunter2@host",
        "me:hunter2@host:5000", "http://hunter2@host", "http://:hunter2@host",
        "http://me:hun/ter2@host", "http://me:hun?ter2@host", "http://me:hun#ter2@host",
        "http://me%3Ahunter2%40host", "http://me%253Ahunter2%2540host",
        "postgresql://me:hun/ter2@db/mlflow", "postgresql://me:12/34@db/mlflow", "http://me:12/34@host:5000",
        "mysql+pymysql://me:hun@ter2@db:3306/mlflow?charset=utf8", "http://host:12?hun@ter2",
        "postgresql://db/mlflow?user=me&PASSWORD=hunter2", "postgresql://db/mlflow?User=me",
        "http://host/?token=hunter2", "http://host/#access_token=hunter2", "http://host?Sig=1",
        "http://host/?pass%77ord=hunter2", "https://bucket/?X-Amz-Signature=1",
        "http://host/?credential=1", "http://host/?api_key=1", "http://host/?client-secret=1",
        "postgresql://db/m?sslpassword=hunter2", "sqlite+pysqlcipher://:hunter2@/x.db",
        "sqlite:////x.db?password=hunter2", "mssql+pyodbc:///?odbc_connect=A%3Db%3BPWD%3Dhunter2",
    ],
)  # fmt: skip
def test_a_secret_in_an_address_is_seen_in_every_spelling(address: str) -> None:
    assert has_secret_in_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "none", "databricks", "databricks://profile", "http://host:5000", "http://[::1]:5000",
        "http://host:5000/user@team", "http://host:5000/#/experiments/3", "https://host/mlflow",
        "sqlite:////home/me@site:b/mlflow.db", "sqlite:///me@site.db?timeout=60",
        "file:///data/me@site", "file:/data/a:b@c", "/data/me@site", "localhost:5000",
        "postgresql://host/db", "postgresql://me@host:5432/db", "mysql://me@host/db",
        "postgresql://db/m?sslmode=require&sslkey=/home/me/key&passfile=/home/me/.pgpass",
        "mssql+pyodbc://host/db?driver=ODBC+Driver+17",
    ],
)  # fmt: skip
def test_an_address_without_a_secret_is_taken(address: str) -> None:
    assert not has_secret_in_address(address)


SECRETS = [
    "PASS", "PWD", "PASSWD", "SECRET", "TOKEN", "KEY", "CREDENTIAL", "AUTH", "PGPASS", "DB_PWD",
    "MLFLOW_TRACKING_PASS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY",
    "WandbApiKey", "apikey", "accessToken", "PGPASSWORD", "db_pass", "PASSWORD2", "SLURM_JWT",
    "GITHUB_PAT", "HTTP_AUTHORIZATION", "SSHPASS", "API_KEYS", "pass_word",
    "LDAP_BINDPW", "DB_CREDS", "SESSION_COOKIE",
]  # fmt: skip
OTHERS = [
    "KEYBOARD", "TOKENIZERS_PARALLELISM", "NCCL_SOCKET_IFNAME", "SSH_AUTH_SOCK", "NCCL_IB_PKEY",
    "PATH", "AUTHOR", "XAUTHORITY", "PGPASSFILE", "SSLKEYLOGFILE", "PGUSER", "PASSIVE",
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "SSH_ASKPASS", "HF_TOKEN_PATH",
]  # fmt: skip


def test_a_switch_a_number_and_the_place_of_a_secret_are_none() -> None:
    innocent = {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "DISABLE_AUTH": "true", "MAX_TOKENS": "4096",
        "NUM_KEYS": "100", "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
        "SSL_KEY": "/etc/key.pem", "SINGULARITY_TOKENFILE": "/home/me/token",
    }  # fmt: skip
    assert [name for name, value in innocent.items() if is_secret_variable(name, value)] == []
    assert is_secret_variable("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI")
    assert is_secret_variable("MLFLOW_TRACKING_PASSWORD", "/hunter2")
    assert is_secret_variable("TOKEN", "1")


def test_names_of_secrets_are_told_from_those_that_share_a_syllable() -> None:
    assert [name for name in SECRETS if not is_secret_variable(name, "x")] == []
    assert [name for name in OTHERS if is_secret_variable(name, "x")] == []


@pytest.mark.parametrize(
    "command",
    [
        "Bearer hunter2", "Authorization: Bearer hunter2", "Basic bWU6aHVudGVyMg==",
        "export DB_PWD=hunter2", "env DB_PWD=hunter2 program", "setenv DB_PWD hunter2",
        "export MLFLOW_TRACKING_URI=http://me:hunter2@host", "program --password=hunter2",
        "export http_proxy=me:hunter2@proxy:3128", "program --token hunter2", "declare API_KEY=1",
        "curl -u me:hunter2 http://host", "git clone https://hunter2@github.com/x",
        "hf_abcdefghijklmnopqrstuv", "host=db,password=hunter2", "wget http://host/?sig=hunter2",
        "sshpass -p hunter2 ssh host", "docker login -u me -p hunter2", "mysql -phunter2",
        "wandb login 0123456789abcdef0123456789abcdef01234567", "openssl enc -pass pass:hunter2",
        "aws configure set aws_secret_access_key hunter2", "dapi0123456789abcdef0123456789abcdef",
    ],
)  # fmt: skip
def test_a_secret_in_a_command_is_seen(command: str) -> None:
    assert has_secret_in_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "module load cuda/13.0", "source /site/me@home/env.sh", "module load token-tools/1.0",
        "export SSH_AUTH_SOCK=/run/agent", "git clone ssh://git@github.com/x", "ulimit -n 4096",
        "export MLFLOW_TRACKING_URI=sqlite:////x", "export NCCL_SOCKET_IFNAME=ib0", "a basic thing",
        "basic: ResNet50", "source /data/hf_datasets_of_the_whole_group/env.sh", "mysql -p",
        "source /data/sk-learn-of-the-whole-group/env.sh", "ssh -p 2222 login1", "wandb offline",
        "git checkout 0123456789abcdef0123456789abcdef01234567", "mkdir -p /local/me",
        "ssh login -p 2222", "mysql --port 3306", "docker login --help",
    ],
)  # fmt: skip
def test_a_command_without_a_secret_is_taken(command: str) -> None:
    assert not has_secret_in_command(command)


def test_what_the_environment_knows_is_kept_out_of_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hun/ter2")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunt\ner2")
    monkeypatch.setenv("SHORT_PWD", "a")
    monkeypatch.setenv("PWD", "/the/folder")
    assert redact_secrets("/the/folder/run") == "/the/folder/run"
    said = r"hun/ter2 hun%2Fter2 b'Bearer hunt\ner2' Basic bWU6aHVuL3RlcjI= at http://u:p/w@h a"
    assert redact_secrets(said) == r"*** *** b'Bearer ***' Basic *** at http://***@h a"
