"""`dafne-federated site`: one hospital in a federation."""

from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable, printable_source
from dafne_federated.cli.site_check import check
from dafne_federated.client.base_review import (
    BaseReview,
    approve_base,
    find_base,
    review_base,
    waiting_bases,
    withdraw_base,
)
from dafne_federated.client.deployment_folder import (
    Connection,
    SiteFolder,
    make_site,
    site_request,
)
from dafne_federated.client.deployment_processes import site_health, start_site
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.supervision import stop as stop_supervisor
from dafne_federated.core.supervision import supervisor

app = typer.Typer(help="One hospital in a federation.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the site.")]
app.command("check")(check)
_SHOWN = 40  # lines of a difference; inspect --sources shows all


@app.command("init")
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of the site, agreed with the coordinator.")],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    ca: Annotated[Path, typer.Option(help="The coordinator's ca.crt.")],
    data: Annotated[Path, typer.Option(help="Folder with images and masks.")],
    local_port: Annotated[int, typer.Option(help="First of three ports of this machine.")] = 9094,
) -> None:
    """Make the folder of a site: a key, settings, a request; nothing is replaced.

    Example: dafne-federated site init site --name clinic --coordinator
    federation.example.org:9443 --ca ca.crt --data images
    """
    connection = Connection(coordinator=coordinator, local_port=local_port)
    made = make_site(folder, name, connection, ca, data)
    settings = made.settings
    print(f"settings:    {made.settings_file}  (read them; they say what the site agrees to)")
    print(f"cases:       {len(settings.training)} to train, {len(settings.validation)} to measure")
    print(f"request:     {made.request_file(name)}  (send it to the coordinator)")
    print(f"fingerprint: {site_request(made).fingerprint}  (compare it by telephone)")


@app.command("approvals")
def approvals(folder: Folder) -> None:
    """Show the bases that are approved here, and those that wait, with what they are.

    Example: dafne-federated site approvals site
    """
    settings = SiteFolder(folder).settings
    entries = Approvals(settings.approvals).entries()
    print(f"approved: {len(entries)}")
    for digest, entry in sorted(entries.items(), key=lambda item: item[1]["when"]):
        words = f"{entry['name']}  {entry['when']}  {entry['why']}"
        print(f"  {digest[:16]}  {printable(words)}")
    waiting = waiting_bases(settings)
    print(f"waiting:  {len(waiting)}")
    for review in waiting:
        _show(review)
        if review.model is not None:
            print(f"  to approve it: dafne-federated site approve {folder} {review.digest[:16]}")


@app.command("approve")
def approve(
    folder: Folder,
    base: Annotated[str, typer.Argument(metavar="FILE|DIGEST", help="A .model, or one waiting.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    why: Annotated[str, typer.Option(help="Kept with the approval, for later readers.")] = "",
) -> None:
    """Allow a base to run at this site: a file, or one that waits, by the start of its digest.

    Example: dafne-federated site approve site 4f0c2a91 --why "sent by the thigh study"
    """
    settings = SiteFolder(folder).settings
    data = find_base(settings, base)
    review = review_base(settings, data)
    _show(review)
    if review.approved:
        print("It is approved already.")
    elif review.model is not None and not yes:
        typer.confirm("Its program will run here, on images of patients. Approve it?", abort=True)
    approve_base(settings, data, why or "approved on the command line")
    if not review.approved:
        print("Approved.")


@app.command("withdraw")
def withdraw(
    folder: Folder,
    digest: Annotated[str, typer.Argument(help="Start of the digest of an approved base.")],
) -> None:
    """Take an approval back; it counts from the next message on.

    Example: dafne-federated site withdraw site 4f0c2a91
    """
    whole = withdraw_base(SiteFolder(folder).settings, digest)
    print(f"{whole[:16]} does not run here any more.")


@app.command("start")
def start(folder: Folder) -> None:
    """Run the site until it is stopped; programs that end are started again.

    Example: dafne-federated site start site
    """
    opened = SiteFolder(folder)
    print(f"site {opened.settings.name!r}, coordinator {opened.connection.coordinator}")
    print(f"logs: {opened.logs}", flush=True)
    start_site(opened)


@app.command("stop")
def stop(folder: Folder) -> None:
    """Stop the site; what it is doing at the moment is lost.

    Example: dafne-federated site stop site
    """
    opened = SiteFolder(folder)
    running = supervisor(opened.lock)
    stopped = stop_supervisor(opened.lock)
    print(f"stopped (process {running})" if stopped else "it was not running")


@app.command("status")
def status(folder: Folder) -> None:
    """Show whether the site runs, what waits for its people, and what it refused last.

    The exit status is 0 if all programs are up, else 1.

    Example: dafne-federated site status site
    """
    opened = SiteFolder(folder)
    settings, running = opened.settings, supervisor(opened.lock)
    health = site_health(opened) if running else {}
    print(f"site:      {settings.name}")
    print(f"running:   {f'yes (process {running})' if running else 'no'}")
    for name, up in health.items():
        print(f"  {name:<8} {'up' if up else 'down'}; log {opened.logs / name}.log")
    print(f"approved:  {len(Approvals(settings.approvals).entries())}")
    waiting = waiting_bases(settings)
    print(f"waiting:   {len(waiting)}{' (dafne-federated site approvals)' if waiting else ''}")
    if opened.refusals.exists():
        (*_, last) = opened.refusals.read_text(encoding="utf-8").splitlines() or [""]
        print(f"refused:   {printable(last)}")
    if not health or not all(health.values()):
        raise typer.Exit(1)


def _show(review: BaseReview) -> None:
    print(f"- digest:  {review.digest}")
    if review.model is None:
        print(f"  it cannot be read, and so not be approved: {printable(review.why_not)}")
        return
    print(f"  name:    {printable(review.name) or '(none)'}")
    print(f"  author:  {printable(review.author) or '(not said)'}  (as the file says)")
    print(f"  labels:  {printable(', '.join(review.labels)) or '(not said)'}")
    changes = review.changes
    if changes is None or changes.known is None:
        print("  program: new here; no base was approved before that it could be compared with")
        return
    known = changes.known
    title = f"{printable(str(known.metadata.get('model_name') or '(none)'))} ({known.digest[:16]})"
    if changes.kind == "same":
        print(f"  program: the same as in {title}, which is approved")
        return
    print(f"  program: other than in {title}: {changes.added} lines new, {changes.removed} gone")
    for line in changes.lines[:_SHOWN]:
        print(f"    {printable_source(line)}")
    if len(changes.lines) > _SHOWN:
        print(f"    ... and {len(changes.lines) - _SHOWN} more lines of difference")
