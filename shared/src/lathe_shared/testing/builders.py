"""Blobs that make up actions, for tests; hash literals come from here and not from copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from lathe_protos import reapi
from lathe_shared.digest import Digest

FileContent = bytes | tuple[bytes, bool]
"""A file's bytes, with whether it is executable if that matters."""


def blob(data: bytes) -> tuple[Digest, bytes]:
    """Return bytes with their digest."""
    return Digest.of(data), data


@dataclass
class BlobSet:
    """Blobs by their digests, collected while something is built of them."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)

    def add(self, data: bytes) -> Digest:
        """Put in bytes and return their digest."""
        digest = Digest.of(data)
        self.blobs[digest] = data
        return digest

    def directory(self, files: Mapping[str, FileContent], symlinks: Mapping[str, str] | None = None) -> Digest:
        """Put in a directory tree and return its root's digest.

        Args:
            files: Content by path; slashes make directories, a path that ends in one makes an empty directory.
            symlinks: Target by path.
        """
        root: dict[str, object] = {}
        for path, content in files.items():
            _place(root, path, content if isinstance(content, tuple) else (content, False))
        for path, target in (symlinks or {}).items():
            _place(root, path, target)
        return self._directory(root)

    def _directory(self, tree: Mapping[str, object]) -> Digest:
        message = reapi.Directory()
        for name, entry in sorted(tree.items()):
            if isinstance(entry, dict):
                digest = self._directory(entry)
                message.directories.append(reapi.DirectoryNode(name=name, digest=digest.to_message()))
            elif isinstance(entry, tuple):
                content, is_executable = entry
                digest = self.add(content)
                message.files.append(reapi.FileNode(name=name, digest=digest.to_message(), is_executable=is_executable))
            else:
                message.symlinks.append(reapi.SymlinkNode(name=name, target=str(entry)))
        return self.add(bytes(message))

    def action(
        self,
        arguments: Iterable[str] = ("true",),
        *,
        input_root: Digest | None = None,
        environment: Mapping[str, str] | None = None,
        output_paths: Iterable[str] = (),
        output_files: Iterable[str] = (),
        output_directories: Iterable[str] = (),
        working_directory: str = "",
        platform: Mapping[str, str] | None = None,
        timeout: timedelta | None = None,
        do_not_cache: bool = False,
        salt: bytes = b"",
    ) -> Digest:
        """Put in an Action with its Command, and an empty input root if none is given; return the Action's digest."""
        properties = [
            reapi.PlatformProperty(name=name, value=value) for name, value in sorted((platform or {}).items())
        ]
        command = reapi.Command(
            arguments=list(arguments),
            environment_variables=[
                reapi.CommandEnvironmentVariable(name=name, value=value)
                for name, value in sorted((environment or {}).items())
            ],
            output_paths=list(output_paths),
            output_files=list(output_files),
            output_directories=list(output_directories),
            working_directory=working_directory,
        )
        action = reapi.Action(
            command_digest=self.add(bytes(command)).to_message(),
            input_root_digest=(input_root or self.directory({})).to_message(),
            do_not_cache=do_not_cache,
            salt=salt,
        )
        if timeout is not None:
            action.timeout = timeout
        if properties:
            action.platform = reapi.Platform(properties=properties)
        return self.add(bytes(action))


def _place(tree: dict[str, object], path: str, entry: object) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        child = tree.setdefault(parent, {})
        assert isinstance(child, dict)
        tree = child
    if name:
        tree[name] = entry
