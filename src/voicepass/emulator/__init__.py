"""A pretend ElevenLabs for tests and the demo: the same wire, no account, nothing spent.

`create_emulator(Emulator(agents=[EmulatedAgent(agent_id="agent_demo")]))` is an ASGI app that mints signed URLs, holds
the conversations behind them with an agent that takes orders, refuses as the real service refuses (`CLOSINGS` says how
sure we are of each row), and goes wrong on demand (`Fault`). It imports nothing else of voicepass.
"""

from voicepass.emulator.agents import EmulatedAgent
from voicepass.emulator.closings import CLOSINGS
from voicepass.emulator.faults import Fault
from voicepass.emulator.server import create_emulator
from voicepass.emulator.service import Emulator

__all__ = ["CLOSINGS", "EmulatedAgent", "Emulator", "Fault", "create_emulator"]
