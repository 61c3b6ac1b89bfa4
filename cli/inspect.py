"""`dafne-federated inspect`: what a `.model` file is, without executing anything of it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dafne_federated.cli.printable import json_value, printable, printable_source
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.model_file import (
    ModelFile,
    model_labels,
    read_model,
    size_mib,
    why_not_adaptable,
)


def inspect(
    file: Annotated[Path, typer.Argument(help="A Dafne .model file.")],
    json_output: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Print the program text inside the file, too.")
    ] = False,
) -> None:
    """Show what a .model file holds; nothing of it is executed.

    Example: dafne-federated inspect Thigh_1610001000.model --json
    """
    model = read_model(file)
    facts = describe(model)
    if json_output:
        text = {**facts, **({"sources": model.functions} if sources else {})}
        print(json.dumps(text, indent=2))
        return
    console = Console()
    table = Table(show_header=False, title=_text(file.name), title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("name", "model_id", "digest", "type", "dimensions", "version", "labels"):
        table.add_row(name.replace("_", " "), _text(facts[name]))
    table.add_row("weights", f"{facts['parameters']:,} values in {len(facts['weights'])} arrays")
    table.add_row("size", f"{facts['mib']:.1f} MiB")
    table.add_row("functions", _text(", ".join(facts["functions"])))
    table.add_row("metadata", _text(facts["metadata"]))
    adaptable = "yes" if facts["adaptable"] else f"no: {facts['why_not']}"
    table.add_row("can be adapted", _text(adaptable))
    approved = "yes" if facts["approved"] else "no (dafne-federated approve FILE)"
    table.add_row("approved on this machine", approved)
    console.print(table)
    layers = Table("weight", "shape", "dtype", title="Weights", title_justify="left")
    for entry in facts["weights"]:
        layers.add_row(_text(entry["key"]), str(tuple(entry["shape"])), entry["dtype"])
    console.print(layers)
    if sources:
        for name, source in model.functions.items():
            console.rule(_text(name))
            console.print(Text(printable_source(source or "(none)")))


def describe(model: ModelFile) -> dict[str, Any]:
    """Return what is known of a model as JSON values."""
    labels = model_labels(model)
    why_not = why_not_adaptable(model)
    stamp = datetime.fromtimestamp(model.timestamp_id, UTC)
    return {
        "name": json_value(model.metadata.get("model_name", "")),
        "model_id": model.model_id,
        "digest": model.digest,
        "content_digest": model.content_digest,
        "sources_digest": model.sources_digest,
        "type": model.type,
        "dimensions": model.dimensionality,
        "timestamp_id": model.timestamp_id,
        "version": f"{model.timestamp_id} ({stamp:%Y-%m-%d %H:%M} UTC)",
        "is_delta": model.is_delta,
        "labels": {str(k): v for k, v in labels.items()} if labels else None,
        "kind": model.kind,
        "parameters": model.parameters,
        "mib": size_mib(model),
        "weights": [
            {"key": key, "shape": list(array.shape), "dtype": str(array.dtype)}
            for key, array in model.weights.items()
        ],
        "functions": [name for name, source in model.functions.items() if source],
        "metadata": json_value(model.metadata),
        "adaptable": why_not is None,
        "why_not": why_not,
        "approved": Approvals().allows(model.digest),
    }


def _text(value: Any) -> Text:
    return Text(printable(value))
