"""`dafne-federated verify`: is a release, to the byte, what a coordinator signed?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable
from dafne_federated.core.signed_release import verify as verify_release


def verify(
    release: Annotated[Path, typer.Argument(help="Folder of a release, or the .model in it.")],
    key: Annotated[
        Path | None, typer.Option(help="release.pub of the coordinator, got on a trusted way.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Check the signature of a release and the digest of each of its files; nothing runs.

    Without --key the files are shown to belong together, but not who made them.

    Example: dafne-federated verify release --key release.pub
    """
    found = verify_release(release, key)
    manifest = found.manifest
    if json_output:
        facts = manifest.model_dump(mode="json") | {
            "fingerprint": found.fingerprint,
            "key_given": found.known,
            "others": found.others,
        }
        print(json.dumps(facts, indent=2))
        return
    print(f"release:   {printable(manifest.model)}, round {manifest.round} of run {manifest.run}")
    print(f"base:      {manifest.base_digest}")
    who = "the key that you gave" if found.known else "the key that lies beside it"
    print(f"signature: fits {who}, {found.fingerprint}")
    print(f"files:     {len(manifest.files)} are what was signed:")
    for name, digest in manifest.files.items():
        print(f"           {digest}  {printable(name)}")
    if found.others:
        print(f"unsigned:  {printable(', '.join(found.others))}")
    if not found.known:
        print(
            "Who holds that key is not known: compare the fingerprint with the coordinator's "
            "people, or give --key release.pub."
        )
