"""`erniekit chat`: talk to a model in the terminal, or through pipes.

In a terminal, `User: ` asks and the answer follows `Assistant: ` as it is generated; `clear` forgets the conversation,
`exit` or Ctrl-D leaves, Ctrl-C stops an answer, and pressed twice leaves. Through a pipe each line is a question;
standard output gets the answers and nothing else.

Where several ranks hold the model, rank 0 has the terminal and the conversation, and the others follow it.
"""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing

from erniekit.config import Config
from erniekit.data.chat.tokenizer import StreamDecoder
from erniekit.generation.load import ChatModel, find_model, sampling_of
from erniekit.generation.session import Session, follow
from erniekit.generation.thinking import Part, ThoughtParser, opens_thought
from erniekit.generation.tool_calls import format_call, read_calls
from erniekit.join import GENERATION, join, require_same_files
from erniekit.models.pipeline_layout import chunks_to_use
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.utils import heartbeat, log, streams
from erniekit.utils.errors import UserError

CLEAR, EXIT = "clear", "exit"
_TAIL = 16  # last tokens of a prompt, among which it may open a thought


def chat(cfg: Config) -> None:
    """Answer questions from standard input until it ends or the user leaves.

    The model is the one that `cfg` names (see generation.load.find_model); max_new_tokens, temperature, top_p, top_k,
    the penalties and seed choose the tokens, `stream` prints them as they come. Raises UserError for a model that
    cannot be loaded and, where questions come through a pipe, for one that cannot be asked.
    """
    mesh = join(cfg, ParallelDims.of_one_copy(cfg), also_compared=GENERATION)
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
    require_same_files(model.prepared.path, {}, mesh.world_group)
    return model.load(mesh, chunks)


def _talk(conversation: "Conversation", screen: "Screen") -> None:
    """Answer questions until there are no more."""
    if screen.interactive:
        screen.note(f"{CLEAR}: forget the conversation; {EXIT} or Ctrl-D: leave; Ctrl-C: stop an answer")
    interrupted = False
    while True:
        with heartbeat.phase(heartbeat.ASKING):
            try:
                question = screen.ask()
            except KeyboardInterrupt:
                if interrupted or not screen.interactive:
                    return
                interrupted = True
                screen.note(f"Ctrl-C again or {EXIT} leaves")
                continue
        if question is None or question.strip() == EXIT:
            return
        interrupted = False
        if question.strip() == CLEAR:
            conversation.clear()
            screen.note("the conversation is forgotten")
        elif question.strip():
            interrupted = _answer(conversation, screen, question)


def _answer(conversation: "Conversation", screen: "Screen", question: str) -> bool:
    """Print the answer to a question. Returns whether Ctrl-C stopped it."""
    before = conversation.messages
    try:
        with closing(conversation.ask(question)) as pieces:
            screen.show(pieces)
    except KeyboardInterrupt:
        screen.note("stopped")
        return True
    except UserError as error:
        if not screen.interactive:
            raise
        screen.note(f"{error} ({CLEAR} starts a new conversation)")
        return False
    calls = [] if conversation.messages is before else read_calls(conversation.messages[-1]["content"]).calls
    if calls:
        screen.note(f"the model calls {', '.join(map(format_call, calls))}; tools are not run here")
    return False


class Conversation:
    """A conversation: its messages so far, and the model that answers."""

    def __init__(self, cfg: Config, chat_model: ChatModel) -> None:
        self._cfg, self._chat_model = cfg, chat_model
        self._limits, self._sampling = chat_model.limits(cfg), sampling_of(cfg)
        self.session = Session(chat_model.model)
        self.clear()

    def clear(self) -> None:
        """Forget the conversation. With a seed the next one draws as this one did."""
        self.messages: list[dict[str, str]] = []
        self.session.clear()
        self._turn = 0

    def ask(self, question: str) -> Generator[tuple[Part, str], None, None]:
        """Pieces of the thought, if there is one, and of the answer, as they come; none ends inside a character.

        Question and answer join the conversation at the end, also where the caller stops early, unless nothing was
        answered; a thought is dropped. Raises UserError for what cannot be asked; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt_ids = self._chat_model.template.prompt_ids(messages, enable_thinking=self._chat_model.enable_thinking)
        answers = self.session.answer(prompt_ids, self._limits, self._sampling, self._turn)
        parser = ThoughtParser(opens_thought(self._chat_model.tokenizer.decode(prompt_ids[-_TAIL:])))
        decoder = StreamDecoder(self._chat_model.tokenizer)
        answer_text = ""
        self._turn += 1
        try:
            for answer in answers:
                text = decoder.push(answer.ids[-1]) if answer.stop_id is None else ""
                pieces = parser.push(text)
                if answer.stop:
                    pieces += [*parser.push(decoder.flush()), *parser.flush()]
                for part, text in pieces:
                    answer_text += text if part == "answer" else ""
                    yield part, text
                if answer.stop == "length":
                    log.info(f"the answer was truncated at max_new_tokens: {self._cfg.max_new_tokens}")
        finally:
            if answer_text:
                self.messages = [*messages, {"role": "assistant", "content": answer_text}]


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

    def show(self, pieces: Iterator[tuple[Part, str]]) -> None:
        """Print an answer piece by piece."""
        if not self._stream:
            pieces = iter(list(pieces))
        if self.interactive:
            self._label("Assistant: ")
        last: Part = "answer"
        try:
            for part, text in pieces:
                if part != last and part == "thought":
                    self._label("\nthinking process:\n" if self.interactive else "thinking process:\n")
                elif part != last:
                    self._label("\n\nanswer:\n" if self._is_terminal else "\n")
                print(text, end="", file=sys.stdout if part == "answer" else self._labels, flush=True)
                last = part
        finally:
            print(flush=True)

    def _label(self, text: str) -> None:
        print(text, end="", file=self._labels, flush=True)
