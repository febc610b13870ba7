"""The command ``iot-collector simulate``."""

import sys

import click

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--devices", default=5, show_default=True, type=click.IntRange(1, 100_000))
@click.option(
    "--rate", type=_POSITIVE, help="Messages per second; as fast as can be when left out."
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many messages.")
@click.option("--duration", type=_POSITIVE, help="Stop after so many seconds.")
@click.option(
    "--topic", default="iot/data", show_default=True, help="{device} stands for the device's name."
)
@click.option(
    "--payload",
    default="text",
    show_default=True,
    type=click.Choice(["text", "json", "garbage", "mix"]),
)
@click.option("--qos", default=1, show_default=True, type=click.IntRange(0, 2))
@click.option(
    "--connections",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Devices share this many connections.",
)
@click.option("--seed", default=1, show_default=True, help="The same seed sends the same messages.")
def simulate(**options: object) -> None:
    """Publish as devices do, to the broker of the settings, and count what it acknowledged."""
    from iot_collector.cli import load_settings

    from .simulate import Plan
    from .simulate import simulate as run_simulation

    sys.exit(run_simulation(load_settings(), Plan(**options)))  # type: ignore[arg-type]
