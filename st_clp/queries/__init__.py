"""Queries of negatives: for a hard negative of one query, another query that this document answers.

Sources know, find or generate them; a chain asks them in order, and the first that knows one wins. Generated queries
are kept in a store, so that nothing is paid for twice.
"""

from st_clp.options import QueryOptions
from st_clp.queries.chain import Need, QueriesAccount, QueryChain, SourceCost, estimate_cost
from st_clp.queries.chat import ChatClient, EndpointError
from st_clp.queries.endpoint import Budget, EndpointQueries, Prices
from st_clp.queries.interface import (
    JUDGMENTS,
    DocumentQueries,
    GeneratingSource,
    NegativeQuery,
    QuerySource,
    Usage,
)
from st_clp.queries.judgments import JudgedQueries
from st_clp.queries.local import LocalQueries
from st_clp.queries.making import make_chain, parse_sources
from st_clp.queries.own_text import SentenceQueries, TitleOrLead, add_sentence_queries
from st_clp.queries.query_store import QueryStore
from st_clp.queries.roundtrip import RoundTrip
from st_clp.queries.wording import Prompts

__all__ = [
    "JUDGMENTS",
    "Budget",
    "ChatClient",
    "DocumentQueries",
    "EndpointError",
    "EndpointQueries",
    "GeneratingSource",
    "JudgedQueries",
    "LocalQueries",
    "Need",
    "NegativeQuery",
    "Prices",
    "Prompts",
    "QueriesAccount",
    "QueryChain",
    "QueryOptions",
    "QuerySource",
    "QueryStore",
    "RoundTrip",
    "SentenceQueries",
    "SourceCost",
    "TitleOrLead",
    "Usage",
    "add_sentence_queries",
    "estimate_cost",
    "make_chain",
    "parse_sources",
]
