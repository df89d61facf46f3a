// An entry of a decode step's work list, between the kernel that plans and the one that computes.
#pragma once
#include "ptx.cuh"

// One split of one sequence, for all heads.
struct alignas(16) WorkItem {
  int sequence, row;      // of the page table; of the queries and the output
  int first_page, pages;  // this split's pages
  int begin, end;         // the tokens the query sees
  int split, splits;
};
