"""Rules whose actions have outputs that are more than one plain file."""

def _directory_output_impl(ctx):
    directory = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run_shell(
        inputs = ctx.files.srcs,
        outputs = [directory],
        mnemonic = "DirectoryOutput",
        command = """
            set -eu
            directory=$1; shift
            mkdir -p "$directory/nested/deeper" "$directory/empty"
            for source in "$@"; do cp "$source" "$directory/nested/"; done
            printf '%s\\n' "$#" > "$directory/count.txt"
            printf '#!/bin/sh\\necho from the directory\\n' > "$directory/nested/deeper/tool.sh"
            chmod 755 "$directory/nested/deeper/tool.sh"
        """,
        arguments = [directory.path] + [source.path for source in ctx.files.srcs],
    )
    return [DefaultInfo(files = depset([directory]))]

directory_output = rule(
    implementation = _directory_output_impl,
    attrs = {"srcs": attr.label_list(allow_files = True)},
    doc = "One action that writes a directory with nested, empty and executable entries (Bazel 4.2.3 drops the empty one).",
)

def _directory_listing_impl(ctx):
    listing = ctx.actions.declare_file(ctx.label.name + ".txt")
    directory = ctx.files.directory[0]
    ctx.actions.run_shell(
        inputs = [directory],
        outputs = [listing],
        mnemonic = "DirectoryListing",
        command = """
            set -eu
            (cd "$1" && find . -type f | LC_ALL=C sort && ./nested/deeper/tool.sh) > "$2"
        """,
        arguments = [directory.path, listing.path],
    )
    return [DefaultInfo(files = depset([listing]))]

directory_listing = rule(
    implementation = _directory_listing_impl,
    attrs = {"directory": attr.label()},
    doc = "One action whose input is another action's directory.",
)

def _symlink_output_impl(ctx):
    target = ctx.actions.declare_file(ctx.label.name + ".target")
    link = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.run_shell(
        outputs = [target, link],
        mnemonic = "SymlinkOutput",
        command = """
            set -eu
            echo 'behind the link' > "$1"
            ln -s "$(basename "$1")" "$2"
        """,
        arguments = [target.path, link.path],
    )
    return [DefaultInfo(files = depset([link, target]))]

symlink_output = rule(
    implementation = _symlink_output_impl,
    doc = "One action that writes a file and a relative symlink to it.",
)

def _written_executable_impl(ctx):
    program = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.run_shell(
        outputs = [program],
        mnemonic = "WrittenExecutable",
        command = """
            set -eu
            printf '#!/bin/sh\\necho "the written program got $1"\\n' > "$1"
            chmod 755 "$1"
        """,
        arguments = [program.path],
    )
    answer = ctx.actions.declare_file(ctx.label.name + ".answer")
    ctx.actions.run_shell(
        outputs = [answer],
        tools = [program],
        mnemonic = "RunWritten",
        command = "exec \"$1\" 42 > \"$2\"",
        arguments = [program.path, answer.path],
    )
    return [DefaultInfo(files = depset([answer]))]

written_executable = rule(
    implementation = _written_executable_impl,
    doc = "One action writes a program, a second one runs it.",
)
