/* Scores rows of numbers from standard input, in C: score MODEL < ROWS. One row of D numbers a line, one log p a line.
 */
#include <nvpflow.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* what) {
  fprintf(stderr, "score: %s: %s\n", what, nvpflow_last_error());
  return 1;
}

int main(int argc, char** argv) {
  nvpflow_flow* flow = NULL;
  float *row, log_prob;
  int64_t columns, filled = 0;
  int status = 0;
  if (argc != 2) {
    fprintf(stderr, "usage: score MODEL < ROWS\n");
    return 2;
  }
  if (nvpflow_load(argv[1], &flow) != NVPFLOW_OK) return fail("the model cannot be loaded");
  columns = nvpflow_input_size(flow);
  row = malloc((size_t)columns * sizeof *row);
  if (row == NULL) {
    nvpflow_free(flow);
    fprintf(stderr, "score: out of memory\n");
    return 1;
  }
  while (status == 0 && scanf("%f", &row[filled]) == 1) {
    if (++filled < columns) continue;
    filled = 0;
    if (nvpflow_log_prob_f32(flow, row, 1, &log_prob) != NVPFLOW_OK) {
      status = fail("a row cannot be scored");
    } else {
      printf("%.7g\n", log_prob);
    }
  }
  if (status == 0 && (filled != 0 || !feof(stdin))) {
    fprintf(stderr, "score: the input ends within a row, or holds something that is not a number\n");
    status = 1;
  }
  free(row);
  nvpflow_free(flow);
  return status;
}
