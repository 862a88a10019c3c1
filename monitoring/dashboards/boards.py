"""The five boards, in the order in which they are looked at."""

from __future__ import annotations

from monitoring.dashboards.hardware import BOARD as HARDWARE
from monitoring.dashboards.overview import BOARD as OVERVIEW
from monitoring.dashboards.plots import Board
from monitoring.dashboards.rag import BOARD as RAG
from monitoring.dashboards.serving import BOARD as SERVING
from monitoring.dashboards.training import BOARD as TRAINING

BOARDS: tuple[Board, ...] = (OVERVIEW, SERVING, RAG, TRAINING, HARDWARE)
