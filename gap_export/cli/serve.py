"""`gap-export serve`: a bundle over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.bounds import Bound
from gap_export.cli.app import console, out
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    BoxFormatOption,
    BundleArgument,
    DeviceOption,
    PrecisionHintOption,
    ProviderOption,
    ThreadsOption,
    runtime_of,
)

_MIB = 2**20
_PORT = Bound(0, 65_535)
_QUEUE = Bound(1, 100_000)
_SECONDS = Bound(0, 86_400, whole=False)
_MEBIBYTES = Bound(1, 1024)
_MEGAPIXELS = Bound(0, 1000, whole=False, above=True)
_SIDE = Bound(4, 32_768)
_CONNECTIONS = Bound(0, 100_000)


def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach it only if it is not loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(**number(_PORT), help="Port; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model, for clients; the bundle's own by default.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="A further name of the model; repeat it for several.")
    ] = None,
    rows: Annotated[
        int, typer.Option(**number(Bound(1, 1024)), help="Most questions that are computed together.")
    ] = 8,
    queue: Annotated[
        int | None,
        typer.Option(
            **number(_QUEUE),
            help="Most requests that wait; further ones are refused. By default 4 for each row that there is, 8 at least.",
        ),
    ] = None,
    deadline: Annotated[
        float,
        typer.Option(
            **number(Bound(0, 86_400, whole=False, above=True)), help="Seconds that a request may take."
        ),
    ] = 60.0,
    image_threads: Annotated[
        int, typer.Option(**number(Bound(1, 64)), help="Threads that decode images.")
    ] = 2,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of keys, one a line; requests without one are refused.")
    ] = None,
    protect_metrics: Annotated[
        bool, typer.Option("--protect-metrics", help="Ask for a key at /metrics too.")
    ] = False,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Listen beyond this machine without keys.")
    ] = False,
    allow_domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Host that images may be fetched from; repeat it for several. None by default.",
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(**number(_MEBIBYTES), help="Most MiB of a request's body.")] = 20,
    max_image_bytes: Annotated[
        int, typer.Option(**number(_MEBIBYTES), help="Most MiB of an image file.")
    ] = 10,
    max_pixels: Annotated[
        float, typer.Option(**number(_MEGAPIXELS), help="Most megapixels of an image.")
    ] = 40.0,
    max_side: Annotated[
        int, typer.Option(**number(_SIDE), help="Longest side of an image, in pixels.")
    ] = 16_384,
    max_connections: Annotated[
        int,
        typer.Option(
            **number(_CONNECTIONS), help="Most connections of one address; 0 for no limit, behind a proxy."
        ),
    ] = 64,
    drain_grace: Annotated[
        float,
        typer.Option(
            **number(_SECONDS),
            help="Seconds to answer on after SIGTERM, while balancers learn that it is not ready.",
        ),
    ] = 0.0,
    allow_baselines: Annotated[
        bool,
        typer.Option(
            "--allow-baselines", help="Serve bundles whose position ids were renumbered on purpose."
        ),
    ] = False,
    adapt: Annotated[
        str | None,
        typer.Option(metavar="FROM:TO", help="Keep fewer visual tokens while requests wait: 1.0:0.25."),
    ] = None,
    max_accuracy_drop: Annotated[
        float, typer.Option(**number(bounds.SHARE), help="With --adapt: largest loss of accuracy.")
    ] = 0.03,
    target_delay: Annotated[
        float,
        typer.Option(
            **number(Bound(0, 3600, whole=False, above=True)),
            help="With --adapt: seconds that requests may wait.",
        ),
    ] = 0.5,
    backend: BackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = 0,
    box_format: BoxFormatOption = None,
) -> None:
    """Serve a bundle over HTTP: boxes of expressions at /v1/ground, free questions at /v1/chat/completions, a page to try it at /.

    The address is printed when connections are accepted. Requests are answered once the session has shown that it computes what PyTorch
    does. SIGTERM and Ctrl-C finish what was admitted; a second one ends at once.
    """
    from gap_export.environment import check_serve_extra

    check_serve_extra("serve")
    from gap_export.serving.http.auth import Keys, others_can_read
    from gap_export.serving.http.settings import HttpSettings
    from gap_export.serving.images import ImageBounds
    from gap_export.serving.limits import EngineLimits
    from gap_export.serving.remote_images import RemoteImages
    from gap_export.serving.serve import AdaptOptions
    from gap_export.serving.serve import serve as run_server
    from gap_export.serving.server import ServerOptions

    keys = None if api_keys is None else Keys.read(api_keys)
    if api_keys is not None and others_can_read(api_keys):
        console.say(("warning:", "yellow"), f" {api_keys} can be read by other users: chmod 600 {api_keys}")
    settings = HttpSettings(
        keys=keys,
        protect_metrics=protect_metrics,
        deadline=deadline,
        images=ImageBounds(
            encoded_bytes=max_image_bytes * _MIB, pixels=max(16, round(max_pixels * 1e6)), side=max_side
        ),
        remote=RemoteImages(allow_domain) if allow_domain else None,
        body_bytes=max_body * _MIB,
        connections_per_address=max_connections,
        allow_baselines=allow_baselines,
    )
    ran = runtime_of(backend, device, precision_hint, provider, bundle)
    run_server(
        bundle,
        names=(*([name] if name is not None else []), *(alias or [])),
        limits=EngineLimits(rows=rows, queue=queue, image_threads=image_threads),
        settings=settings,
        options=ServerOptions(host, port, drain_grace),
        allow_anonymous=allow_anonymous,
        adapt=None if adapt is None else AdaptOptions(adapt, max_accuracy_drop, target_delay),
        backend=ran,
        threads=threads,
        box_format=box_format,
        on_listening=lambda server: out.write_line(f"serving {server.name} at {server.address}"),
        tell=console.say,
    )
