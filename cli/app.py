"""The command `dafne-federated`: its sub-commands, and errors in one line."""

import logging
import os
import sys
from typing import Never

import typer
from pydantic import ValidationError

from dafne_federated.cli.adopt import adopt
from dafne_federated.cli.approve import approve
from dafne_federated.cli.benchmark import benchmark
from dafne_federated.cli.check_data import check_data
from dafne_federated.cli.evaluate import evaluate
from dafne_federated.cli.finetune import finetune
from dafne_federated.cli.inspect import inspect
from dafne_federated.cli.merge import merge
from dafne_federated.cli.methods import methods
from dafne_federated.cli.models import app as models
from dafne_federated.cli.new_task import new_task
from dafne_federated.cli.printable import printable
from dafne_federated.cli.releases import app as releases
from dafne_federated.cli.report import report
from dafne_federated.cli.server import app as server
from dafne_federated.cli.simulate import simulate
from dafne_federated.cli.site import app as site
from dafne_federated.cli.train import train
from dafne_federated.cli.verify import verify
from dafne_federated.core.errors import DafneFederatedError

app = typer.Typer(
    name="dafne-federated",
    help="Federated adaptation of Dafne segmentation models. "
    "Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("simulate")(simulate)
app.command("inspect")(inspect)
app.command("approve")(approve)
app.command("methods")(methods)
app.command("new-task")(new_task)
app.command("check-data")(check_data)
app.command("train")(train)
app.command("finetune")(finetune)
app.command("evaluate")(evaluate)
app.command("benchmark")(benchmark)
app.command("merge")(merge)
app.command("adopt")(adopt)
app.command("report")(report)
app.command("verify")(verify)
app.add_typer(server, name="server")
app.add_typer(site, name="site")
app.add_typer(models, name="models")
app.add_typer(releases, name="releases")


def main() -> None:
    """Run the command line; an error of ours, or of a file, is one line and exit status 1."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except DafneFederatedError as error:
        _fail(str(error))
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(map(str, first['loc'])) or error.title}: {first['msg']}")
    except OSError as error:
        named = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{named}{error.strerror or error}")


def _fail(message: str) -> Never:
    print(f"dafne-federated: {printable(message)}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
