"""The service for Ray Serve's tools: `serve run serve.app:build run=runs/demo`, `serve deploy serve/config.yaml`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from kka_ray.config import parse
from kka_ray.config.serve import ServeConfig
from kka_ray.errors import ConfigError
from kka_ray.serving.access import make_token, write_token
from kka_ray.serving.deployment import build_application


def build(args: dict[str, Any]) -> Application:
    """The application of `run`, a run's folder or its detector folder; the other arguments are those of `ServeConfig`.

    Set `KKA_SERVE_TOKEN` in the environment of the cluster's nodes; without it a token is generated on the node that
    builds the application, into `~/.cache/kka_ray/serve`. Raises ConfigError or AssetError.
    """
    values = dict(args)
    run = values.pop("run", None)
    if not run:
        raise ConfigError("name the run's folder: run=runs/demo")
    if {"host", "port"} & values.keys():
        raise ConfigError("host and port belong to the cluster: set http_options in serve/config.yaml")
    config = parse(values, ServeConfig, "the application's arguments")
    token = make_token()
    application = build_application(run, config, token.digest)
    write_token(token, run)
    return application
