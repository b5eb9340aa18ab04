"""`erniekit chat`: talk to a model in the terminal, or through pipes.

In a terminal, `User: ` asks and the answer follows `Assistant: ` as it is generated; `clear` forgets the conversation,
`exit` or Ctrl-D leaves, Ctrl-C stops an answer, and pressed twice leaves. Through a pipe each line is a question,
standard output gets the answers and nothing else, and Ctrl-C ends the command. A vision-language model is shown the
files of `<image>path</image>` and `<video>path</video>` in a question, and of lines `/image path` and `/video path`
before it.

Where several ranks hold the model, rank 0 has the terminal and the conversation, and the others follow it.
"""

import sys
from collections.abc import Iterator
from contextlib import closing

from erniekit.config import Config
from erniekit.generation.load import ChatModel, find_model
from erniekit.generation.session import follow
from erniekit.generation.tool_calls import format_call, read_calls
from erniekit.join import join, require_same_files
from erniekit.models.pipeline_layout import chunks_to_use
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.serve.conversation import Conversation, Piece
from erniekit.serve.typed_media import command_of, has_media
from erniekit.utils import heartbeat, streams
from erniekit.utils.errors import UserError

CLEAR, EXIT = "clear", "exit"


def chat(cfg: Config) -> None:
    """Answer questions from standard input until it ends or the user leaves.

    The model is the one that `cfg` names (see generation.load.find_model); max_new_tokens, temperature, top_p, top_k,
    the penalties and seed choose the tokens, `stream` prints them as they come. Raises UserError for a model that
    cannot be loaded and, where questions come through a pipe, for one that cannot be asked.
    """
    mesh = join(cfg, ParallelDims.of_one_copy(cfg), "chat")
    chat_model = _open(cfg, mesh)
    if mesh.rank:
        return follow(chat_model.model)
    conversation = Conversation(cfg, chat_model)
    _talk(conversation, Screen(sys.stdin.isatty(), sys.stdout.isatty(), cfg.stream))
    conversation.session.close()


def _open(cfg: Config, mesh: Mesh) -> ChatModel:
    """Load this rank's shard of the model. An error on one rank is raised on all."""
    with all_or_none(mesh.world_group):
        model = find_model(cfg)
        chunks = chunks_to_use(cfg, model.prepared.config, mesh.degrees, mesh.pipe)
    require_same_files(model.prepared.path, model.prepared.adapter_dir, {}, mesh.world_group)
    return model.load(mesh, chunks)


def _talk(conversation: Conversation, screen: "Screen") -> None:
    """Questions and answers, until the questions end."""
    if screen.interactive:
        screen.note(f"{CLEAR}: forget the conversation; {EXIT} or Ctrl-D: leave; Ctrl-C: stop an answer")
        if conversation.sees_pictures:
            screen.note(
                "pictures: <image>path</image> in a question, or /image path before it; <video> and /video likewise"
            )
    interrupted = False
    while True:
        with heartbeat.phase(heartbeat.ASKING):
            try:
                question = screen.ask()
            except KeyboardInterrupt:
                if not screen.interactive:
                    raise
                if interrupted:
                    return
                interrupted = True
                screen.note(f"Ctrl-C again or {EXIT} leaves")
                continue
            except UserError as error:  # a question in another encoding
                if not screen.interactive:
                    raise
                screen.note(str(error))
                continue
        if question is None or question.strip() == EXIT:
            return
        interrupted = False
        if question.strip() == CLEAR:
            conversation.clear()
            screen.note("the conversation is forgotten")
        elif command_of(question) is not None:
            _add_medium(conversation, screen, question)
        elif question.strip():
            interrupted = _answer(conversation, screen, question)


def _add_medium(conversation: Conversation, screen: "Screen", line: str) -> None:
    """Show the model the picture or video that a line `/image path` or `/video path` names."""
    command = command_of(line)
    assert command is not None
    try:
        screen.note(conversation.add(*command))
    except UserError as error:
        if not screen.interactive:
            raise
        screen.note(str(error))


def _answer(conversation: Conversation, screen: "Screen", question: str) -> bool:
    """Print the answer to a question. True if Ctrl-C stopped it."""
    before = conversation.messages
    if has_media(question) and not conversation.sees_pictures:
        screen.note("this is a model of text alone: <image> and <video> are read as text")
    try:
        with closing(conversation.ask(question)) as pieces:
            screen.show(pieces)
    except KeyboardInterrupt:
        if not screen.interactive:  # what reads the answers has to learn that this one was cut off
            raise
        screen.note("stopped")
        return True
    except UserError as error:
        if not screen.interactive:
            raise
        screen.note(f"{error} ({CLEAR} starts a new conversation)")
        return False
    if conversation.messages is not before and not conversation.has_tools:
        calls = read_calls(conversation.messages[-1]["content"]).calls
        if calls:
            screen.note(f"the model calls {', '.join(map(format_call, calls))}; tools are not run here")
    return False


class Screen:
    """The input of questions and the output of answers. `interactive`: whether a user types the questions."""

    def __init__(self, stdin_is_terminal: bool, stdout_is_terminal: bool, stream: bool = True) -> None:
        """`stdin_is_terminal`: a user types the questions; `stdout_is_terminal`: a user reads the answers.
        `stream`: show text as it comes.
        """
        self.interactive = stdin_is_terminal
        self._is_terminal = stdin_is_terminal and stdout_is_terminal
        self._stream = stream
        # Between people and model everything goes one way; answers that go to a file or a program go there alone.
        self._labels = sys.stdout if self._is_terminal else sys.stderr
        if self._is_terminal:
            try:
                import readline  # noqa: F401  gives input() its line editing and history
            except ImportError:
                pass

    def ask(self) -> str | None:
        """The next question; None at the end of the input."""
        if self._is_terminal:
            try:
                return streams.decode(input("User: "))
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                raise
        if self.interactive:
            print("User: ", end="", file=self._labels, flush=True)
        return streams.read_line()

    def note(self, text: str) -> None:
        """Print a note that is not part of the conversation."""
        print(f"[{text}]", file=sys.stderr, flush=True)

    def show(self, pieces: Iterator[Piece]) -> None:
        """Print an answer piece by piece; notes go beside it, each in a line of its own."""
        if not self._stream:
            pieces = iter(list(pieces))
        last, within = "", False  # within: the cursor is behind a part of a line
        try:
            for part, text in pieces:
                if part == "note":
                    if within:
                        print(file=sys.stdout if last == "answer" else self._labels, flush=True)
                    self.note(text)
                else:
                    self._begin(part, last)
                    print(text, end="", file=sys.stdout if part == "answer" else self._labels, flush=True)
                last, within = ("", False) if part == "note" else (part, True)
        finally:
            if not within and self.interactive:
                self._label("Assistant: ")
            print(flush=True)

    def _begin(self, part: str, last: str) -> None:
        """Label a thought or an answer that follows `last`; "": it is the first of the model's message."""
        if not last and self.interactive:
            self._label("Assistant: ")
        if part == "thought" and last != "thought":
            self._label("\nthinking process:\n" if self.interactive else "thinking process:\n")
        elif part == "answer" and last == "thought":
            self._label("\n\nanswer:\n" if self._is_terminal else "\n")

    def _label(self, text: str) -> None:
        print(text, end="", file=self._labels, flush=True)
