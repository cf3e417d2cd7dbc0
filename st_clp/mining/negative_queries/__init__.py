"""Queries of negatives: for a hard negative of one query, a query that this document does answer.

Sources know, find or write them; a chain asks them in order, and the first that knows one wins. What a model wrote is
kept in a store, so that nothing is paid for twice.
"""

from st_clp.mining.negative_queries.budget import Budget, Prices
from st_clp.mining.negative_queries.chain import Need, QueriesAccount, QueryChain
from st_clp.mining.negative_queries.chat import ChatClient, EndpointError
from st_clp.mining.negative_queries.endpoint import EndpointQueries
from st_clp.mining.negative_queries.interface import (
    JUDGMENTS,
    DocumentQueries,
    GeneratingSource,
    NegativeQuery,
    QuerySource,
    Usage,
)
from st_clp.mining.negative_queries.judgments import JudgedQueries
from st_clp.mining.negative_queries.lead import TitleOrLead
from st_clp.mining.negative_queries.local import LocalQueries
from st_clp.mining.negative_queries.making import make_chain, parse_sources
from st_clp.mining.negative_queries.outlook import SourceOutlook, outlook
from st_clp.mining.negative_queries.prompts import Prompts
from st_clp.mining.negative_queries.roundtrip import RoundTrip
from st_clp.mining.negative_queries.store import QueryStore
from st_clp.options import QueryOptions

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
    "SourceOutlook",
    "TitleOrLead",
    "Usage",
    "make_chain",
    "outlook",
    "parse_sources",
]
