"""A pretend ElevenLabs for tests and the demo: the same wire, no account, nothing spent.

`create_emulator(Emulator(agents=[EmulatedAgent(agent_id="agent_demo")]))` is an ASGI app that mints signed URLs, holds
the conversations behind them with an agent that takes orders, refuses as the real service refuses (`CLOSINGS` says how
sure we are of each row), and goes wrong on demand (`Fault`). It imports nothing else of voicepass.
"""

from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.closings import CLOSINGS
from elevenlabs_emulator.faults import Fault
from elevenlabs_emulator.server import create_emulator
from elevenlabs_emulator.service import Emulator

__all__ = ["CLOSINGS", "EmulatedAgent", "Emulator", "Fault", "create_emulator"]
