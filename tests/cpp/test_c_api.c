/* The C interface from C: every function, every status, and the numbers against those of a file made by Python.
 * test_c_api MODEL_F32 MODEL_F64: golden models of one spec. Prints log p of one row; exit code 0 where all holds. */
#include <math.h>
#include <nvpflow.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void check(int holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "line %d: %s does not hold; last error: %s\n", line, what, nvpflow_last_error());
}
#define CHECK(condition) check((condition), #condition, __LINE__)

enum { MAX_ELEMENTS = 4096 };

/* program: a file that is no model. */
static void check_errors(const char* program, const char* path, nvpflow_flow* flow) {
  nvpflow_flow* none = flow;
  float x[MAX_ELEMENTS] = {0}, out[64];
  double wide[MAX_ELEMENTS] = {0};
  const int64_t columns = nvpflow_input_size(flow);
  CHECK(nvpflow_load(NULL, &none) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(none == NULL);
  CHECK(strstr(nvpflow_last_error(), "path is NULL") != NULL);
  CHECK(nvpflow_load(path, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_load("there/is/no/such/file", &none) == NVPFLOW_IO);
  CHECK(nvpflow_system_error() == 2);
  CHECK(strstr(nvpflow_last_error(), "there/is/no/such/file") != NULL);
  CHECK(nvpflow_load(program, &none) == NVPFLOW_FILE_FORMAT);
  CHECK(nvpflow_system_error() == 0);
  CHECK(nvpflow_load_on(path, "abacus", NULL, NULL, &none) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strstr(nvpflow_last_error(), "abacus") != NULL);
  CHECK(nvpflow_load_on(path, "cpu", "float32", "octal", &none) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_load_on(path, NULL, "tf32", NULL, &none) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(none == NULL);

  CHECK(nvpflow_log_prob_f32(NULL, x, 1, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, NULL, 1, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, x, -1, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, x, INT64_MAX, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, x, INT64_MAX / columns, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, x) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strstr(nvpflow_last_error(), "overlaps") != NULL);
  CHECK(nvpflow_log_prob_f32(flow, NULL, 0, NULL) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f64(flow, wide, 1, wide + columns) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_forward_f32(flow, x, 1, x, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_takes_float64_rows(NULL) == -1);
  CHECK(nvpflow_log_prob_rows64(NULL, wide, 1, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_sample_rows64(flow, 0, 0, 1, NULL) != NVPFLOW_OK);
  CHECK(nvpflow_sample_f32(flow, 0, 0, 1, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_set_num_threads(flow, -1) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_prepare(flow, -1) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_reload(flow, "there/is/no/such/file") == NVPFLOW_IO);
  CHECK(nvpflow_swap(flow, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_input_size(NULL) == -1 && nvpflow_dtype_of(NULL) == -1 && nvpflow_num_parameters(NULL) == -1);
  CHECK(nvpflow_num_layers(NULL) == -1 && nvpflow_num_couplings(NULL) == -1);
  CHECK(nvpflow_context_size(NULL) == -1 && nvpflow_context_size(flow) == 0);
  nvpflow_free(NULL);
}

/* What a flow without a context and NULL make of each function with one; test_c_context.cpp has the flows with one. */
static void check_context_errors(nvpflow_flow* flow) {
  nvpflow_flow* none;
  float x[MAX_ELEMENTS] = {0}, z[MAX_ELEMENTS], out[4], c[1] = {0}, gradient[1];
  double x64[MAX_ELEMENTS] = {0}, z64[MAX_ELEMENTS], out64[4], c64[1] = {0}, gradient64[1], nll;
  nvpflow_flow* flows[2];
  int i;
  flows[0] = flow;
  flows[1] = NULL;
  for (i = 0; i < 2; ++i) {
    const nvpflow_flow* f = flows[i];
    CHECK(nvpflow_log_prob_context_f32(f, x, 1, c, 1, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_log_prob_context_f64(f, x64, 1, c64, 1, out64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_log_prob_context_rows64(f, x64, 1, c, 1, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_forward_context_f32(f, x, 1, c, 1, z, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_forward_context_f64(f, x64, 1, c64, 1, z64, out64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_forward_context_rows64(f, x64, 1, c, 1, z, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_inverse_context_f32(f, z, 1, c, 1, x, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_inverse_context_f64(f, z64, 1, c64, 1, x64, out64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_inverse_context_rows64(f, z, 1, c, 1, x64, out) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_sample_context_f32(f, 1, 0, 1, c, 1, x) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_sample_context_f64(f, 1, 0, 1, c64, 1, x64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_sample_context_rows64(f, 1, 0, 1, c, 1, x64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_score_context_f32(f, x, 1, c, 1, z) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_score_context_f64(f, x64, 1, c64, 1, z64) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_score_context_rows64(f, x64, 1, c, 1, z) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_nll_gradient_context_f32(f, x, 1, c, 1, &nll, gradient) == NVPFLOW_INVALID_ARGUMENT);
    CHECK(nvpflow_nll_gradient_context_f64(f, x64, 1, c64, 1, &nll, gradient64) == NVPFLOW_INVALID_ARGUMENT);
    none = flow;
    CHECK(nvpflow_condition_f32(f, c, &none) == NVPFLOW_INVALID_ARGUMENT && none == NULL);
    none = flow;
    CHECK(nvpflow_condition_f64(f, c64, &none) == NVPFLOW_INVALID_ARGUMENT && none == NULL);
  }
  CHECK(nvpflow_log_prob_context_rows64(flow, x64, 1, c, 1, out) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strcmp(nvpflow_last_error(),
               "the flow has context_size 0, expected one that takes a context; call nvpflow_log_prob_rows64") == 0);
  CHECK(nvpflow_condition_f32(flow, c, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strcmp(nvpflow_last_error(), "conditioned is NULL") == 0);
}

static void check_spec(nvpflow_flow* flow) {
  size_t needed = 0;
  char* text;
  CHECK(nvpflow_spec_json(flow, NULL, 0, &needed) == NVPFLOW_OK);
  CHECK(needed > 20);
  text = malloc(needed);
  CHECK(nvpflow_spec_json(flow, text, needed - 1, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_spec_json(flow, text, needed, NULL) == NVPFLOW_OK);
  CHECK(strlen(text) == needed - 1);
  CHECK(strstr(text, "\"input_size\":") != NULL);
  free(text);
  CHECK(nvpflow_num_layers(flow) >= nvpflow_num_couplings(flow) && nvpflow_num_couplings(flow) > 0);
  CHECK(nvpflow_num_parameters(flow) > 0);
}

static void check_numbers(nvpflow_flow* flow, nvpflow_flow* wide) {
  enum { ROWS = 3 };
  const int64_t d = nvpflow_input_size(flow);
  float x[MAX_ELEMENTS], z[MAX_ELEMENTS], back[MAX_ELEMENTS], log_det[ROWS], inverse[ROWS], log_prob[ROWS];
  double x64[MAX_ELEMENTS], z64[MAX_ELEMENTS], back64[MAX_ELEMENTS], log_det64[ROWS], log_prob64[ROWS];
  int64_t i, r;
  CHECK(d == nvpflow_input_size(wide) && ROWS * d <= MAX_ELEMENTS);
  CHECK(nvpflow_sample_f32(flow, 7, 10, ROWS, x) == NVPFLOW_OK);
  CHECK(nvpflow_sample_f32(flow, 7, 11, 1, z) == NVPFLOW_OK);
  CHECK(memcmp(x + d, z, (size_t)d * sizeof(float)) == 0);
  CHECK(nvpflow_forward_f32(flow, x, ROWS, z, log_det) == NVPFLOW_OK);
  CHECK(nvpflow_inverse_f32(flow, z, ROWS, back, inverse) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f32(flow, x, ROWS, log_prob) == NVPFLOW_OK);
  for (i = 0; i < ROWS * d; ++i) {
    CHECK(fabsf(back[i] - x[i]) <= 1e-4f * (1 + fabsf(x[i])));
    x64[i] = x[i];
  }
  CHECK(nvpflow_forward_f64(wide, x64, ROWS, z64, log_det64) == NVPFLOW_OK);
  CHECK(nvpflow_inverse_f64(wide, z64, ROWS, back64, NULL) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f64(wide, x64, ROWS, log_prob64) == NVPFLOW_OK);
  for (i = 0; i < ROWS * d; ++i) CHECK(fabs(back64[i] - x64[i]) <= 1e-11 * (1 + fabs(x64[i])));
  for (r = 0; r < ROWS; ++r) {
    double by_hand = log_det64[r] - 0.9189385332046727 * (double)d; /* log(2 pi) / 2 */
    for (i = 0; i < d; ++i) by_hand -= 0.5 * z64[r * d + i] * z64[r * d + i];
    CHECK(fabs(by_hand - log_prob64[r]) <= 1e-11 * (1 + fabs(by_hand)));
    CHECK(fabsf(log_det[r] + inverse[r]) <= 1e-4f);
    CHECK(isfinite(log_prob[r]));
  }
  CHECK(nvpflow_takes_float64_rows(flow) == 1 && nvpflow_takes_float64_rows(wide) == 0);
  CHECK(nvpflow_log_prob_rows64(flow, x64, ROWS, inverse) == NVPFLOW_OK);
  for (r = 0; r < ROWS; ++r) CHECK(fabsf(inverse[r] - log_prob[r]) <= 1e-4f * (1 + fabsf(log_prob[r])));
  CHECK(nvpflow_forward_rows64(flow, x64, ROWS, z, log_det) == NVPFLOW_OK);
  CHECK(nvpflow_inverse_rows64(flow, z, ROWS, back64, inverse) == NVPFLOW_OK);
  for (i = 0; i < ROWS * d; ++i) CHECK(fabs(back64[i] - x64[i]) <= 1e-4 * (1 + fabs(x64[i])));
  CHECK(nvpflow_sample_rows64(flow, 7, 10, ROWS, back64) == NVPFLOW_OK);
  for (i = 0; i < ROWS * d; ++i) CHECK(fabs(back64[i] - x[i]) <= 1e-4 * (1 + fabs(x64[i])));
  CHECK(nvpflow_log_prob_rows64(wide, x64, ROWS, log_det) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_sample_rows64(wide, 7, 10, ROWS, back64) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_sample_f64(wide, 7, 10, ROWS, z64) == NVPFLOW_OK);
  x[0] = NAN;
  CHECK(nvpflow_log_prob_f32(flow, x, ROWS, log_det) == NVPFLOW_OK);
  CHECK(isnan(log_det[0]) && log_det[1] == log_prob[1]);
}

static void check_names_and_threshold(nvpflow_flow* flow) {
  double limit = 0, quantile = 0;
  char text[2] = "x";
  size_t needed = 0;
  CHECK(nvpflow_column_name(flow, 0, NULL, 0, &needed) == NVPFLOW_OK && needed == 1);
  CHECK(nvpflow_column_name(flow, 0, text, sizeof text, NULL) == NVPFLOW_OK && text[0] == 0);
  CHECK(nvpflow_column_name(flow, -1, text, sizeof text, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_column_name(flow, nvpflow_input_size(flow), text, sizeof text, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strstr(nvpflow_last_error(), "column is ") != NULL);
  CHECK(nvpflow_column_name(NULL, 0, text, sizeof text, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_context_name(flow, 0, text, sizeof text, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strstr(nvpflow_last_error(), "the flow has no context") != NULL);
  CHECK(nvpflow_context_name(NULL, 0, text, sizeof text, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_threshold(flow, &limit, &quantile) == NVPFLOW_OK && isnan(limit) && isnan(quantile));
  CHECK(nvpflow_threshold(flow, &limit, NULL) == NVPFLOW_OK);
  CHECK(nvpflow_threshold(flow, NULL, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_threshold(NULL, &limit, NULL) == NVPFLOW_INVALID_ARGUMENT);
}

static void check_score(nvpflow_flow* flow, nvpflow_flow* wide) {
  const int64_t d = nvpflow_input_size(wide);
  const double step = 1e-6;
  float x[MAX_ELEMENTS], score[MAX_ELEMENTS], of_rows64[MAX_ELEMENTS];
  double x64[MAX_ELEMENTS], score64[MAX_ELEMENTS], ends[2];
  nvpflow_flow* warm = flow;
  int64_t i;
  CHECK(nvpflow_sample_f32(flow, 5, 0, 1, x) == NVPFLOW_OK);
  for (i = 0; i < d; ++i) x64[i] = x[i];
  CHECK(nvpflow_score_f64(wide, x64, 1, score64) == NVPFLOW_OK);
  for (i = 0; i < d; ++i) {
    x64[i] += step;
    CHECK(nvpflow_log_prob_f64(wide, x64, 1, ends) == NVPFLOW_OK);
    x64[i] -= 2 * step;
    CHECK(nvpflow_log_prob_f64(wide, x64, 1, ends + 1) == NVPFLOW_OK);
    x64[i] += step;
    CHECK(fabs((ends[0] - ends[1]) / (2 * step) - score64[i]) <= 1e-5 * (1 + fabs(score64[i])));
  }
  CHECK(nvpflow_score_f32(flow, x, 1, score) == NVPFLOW_OK);
  CHECK(nvpflow_score_rows64(flow, x64, 1, of_rows64) == NVPFLOW_OK);
  for (i = 0; i < d; ++i) CHECK(fabsf(score[i] - of_rows64[i]) <= 1e-3f * (1 + fabsf(score[i])));
  CHECK(nvpflow_score_f32(flow, x, 1, x) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_score_f32(NULL, x, 1, score) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_score_f32(wide, x, 1, score) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_temper(NULL, 0.5, &warm) == NVPFLOW_INVALID_ARGUMENT && warm == NULL);
  CHECK(nvpflow_temper(flow, 0.5, NULL) == NVPFLOW_INVALID_ARGUMENT);
}

/* The gradient's bits are held against Python's by tests/python/test_embedding.py. */
static void check_gradient(nvpflow_flow* flow, nvpflow_flow* wide) {
  enum { ROWS = 3 };
  const int64_t d = nvpflow_input_size(flow), count = nvpflow_num_parameters(flow);
  float x[MAX_ELEMENTS], log_prob[ROWS], *gradient = malloc((size_t)count * sizeof(float));
  double x64[MAX_ELEMENTS], log_prob64[ROWS], weights[ROWS] = {1, 0, 3}, nll, nll64,
                                              *gradient64 = malloc((size_t)count * sizeof(double));
  int64_t i;
  CHECK(nvpflow_sample_f32(flow, 3, 0, ROWS, x) == NVPFLOW_OK);
  for (i = 0; i < ROWS * d; ++i) x64[i] = x[i];
  CHECK(nvpflow_nll_gradient_f32(flow, x, ROWS, &nll, gradient) == NVPFLOW_OK);
  CHECK(nvpflow_nll_gradient_f64(wide, x64, ROWS, &nll64, gradient64) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f32(flow, x, ROWS, log_prob) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f64(wide, x64, ROWS, log_prob64) == NVPFLOW_OK);
  CHECK(fabs(nll64 + (log_prob64[0] + log_prob64[1] + log_prob64[2]) / 3) <= 1e-12 * (1 + fabs(nll64)));
  CHECK(fabs(nll + ((double)log_prob[0] + log_prob[1] + log_prob[2]) / 3) <= 1e-5 * (1 + fabs(nll)));
  for (i = 0; i < count; ++i) CHECK(isfinite(gradient[i]) && isfinite(gradient64[i]));
  CHECK(nvpflow_nll_gradient_weighted_f32(flow, x, ROWS, weights, &nll, gradient) == NVPFLOW_OK);
  CHECK(fabs(nll + (log_prob[0] + 3 * (double)log_prob[2]) / 4) <= 1e-5 * (1 + fabs(nll)));
  CHECK(nvpflow_nll_gradient_weighted_f64(wide, x64, ROWS, weights, &nll64, gradient64) == NVPFLOW_OK);
  CHECK(fabs(nll64 + (log_prob64[0] + 3 * log_prob64[2]) / 4) <= 1e-12 * (1 + fabs(nll64)));
  weights[1] = -1;
  CHECK(nvpflow_nll_gradient_weighted_f32(flow, x, ROWS, weights, &nll, gradient) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(strcmp(nvpflow_last_error(),
               "sample_weight[1] is -1, expected at least 0: with a row of negative weight the loss has "
               "no minimum") == 0);
  CHECK(nvpflow_nll_gradient_weighted_f64(wide, x64, ROWS, NULL, &nll64, gradient64) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_nll_gradient_f32(flow, x, 0, &nll, gradient) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_nll_gradient_f32(flow, x, ROWS, NULL, gradient) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_nll_gradient_f32(flow, x, ROWS, &nll, NULL) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_nll_gradient_f32(wide, x, ROWS, &nll, gradient) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_nll_gradient_f32(NULL, x, ROWS, &nll, gradient) == NVPFLOW_INVALID_ARGUMENT);
  free(gradient);
  free(gradient64);
}

static void check_replacing(const char* path, nvpflow_flow* flow, nvpflow_flow* wide) {
  float x[MAX_ELEMENTS], before, after;
  nvpflow_flow* other = NULL;
  CHECK(nvpflow_load_on(path, "cpu", "float32", "bfloat16", &other) == NVPFLOW_OK);
  CHECK(nvpflow_sample_f32(flow, 1, 0, 1, x) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, &before) == NVPFLOW_OK);
  CHECK(nvpflow_swap(flow, wide) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_swap(flow, other) == NVPFLOW_OK);
  CHECK(nvpflow_swap(flow, flow) == NVPFLOW_OK);
  CHECK(nvpflow_reload(flow, path) == NVPFLOW_OK);
  CHECK(nvpflow_prepare(flow, 1) == NVPFLOW_OK && nvpflow_prepare(flow, 0) == NVPFLOW_OK);
  CHECK(nvpflow_set_num_threads(flow, 1) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, &after) == NVPFLOW_OK);
  CHECK(before == after);
  nvpflow_free(other);
}

static void check_initialize_from(nvpflow_flow* flow, nvpflow_flow* wide) {
  const double x64[10] = {1, 2, 3, 4, 5, 3, 6, 9, 12, 15};
  float x[10], before, after;
  int i;
  for (i = 0; i < 10; ++i) x[i] = (float)x64[i];
  CHECK(nvpflow_log_prob_f32(flow, x, 1, &before) == NVPFLOW_OK);
  CHECK(nvpflow_initialize_from_f32(flow, x, 1) == NVPFLOW_INVALID_ARGUMENT); /* constant */
  CHECK(nvpflow_initialize_from_f32(flow, x, 0) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_initialize_from_f32(NULL, x, 2) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_initialize_from_f32(wide, x, 2) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, &after) == NVPFLOW_OK);
  CHECK(before == after);
  CHECK(nvpflow_initialize_from_f64(flow, x64, 2) ==
        NVPFLOW_OK); /* float64 rows into a float32 flow that standardizes */
  CHECK(nvpflow_initialize_from_f32(flow, x, 2) == NVPFLOW_OK);
  CHECK(nvpflow_initialize_from_f64(wide, x64, 2) == NVPFLOW_OK);
  CHECK(nvpflow_log_prob_f32(flow, x, 1, &after) == NVPFLOW_OK);
  CHECK(before != after);
}

int main(int argc, char** argv) {
  nvpflow_flow *flow = NULL, *wide = NULL;
  if (argc != 3) return 2;
  CHECK(strcmp(nvpflow_last_error(), "") == 0);
  CHECK(strlen(nvpflow_version()) >= 5);
  CHECK(nvpflow_load(argv[1], &flow) == NVPFLOW_OK);
  CHECK(nvpflow_load(argv[2], &wide) == NVPFLOW_OK);
  if (flow == NULL || wide == NULL) return 1;
  CHECK(nvpflow_dtype_of(flow) == NVPFLOW_FLOAT32 && nvpflow_dtype_of(wide) == NVPFLOW_FLOAT64);
  check_errors(argv[0], argv[1], flow);
  check_context_errors(flow);
  check_spec(flow);
  check_numbers(flow, wide);
  check_names_and_threshold(flow);
  check_score(flow, wide);
  check_gradient(flow, wide);
  check_replacing(argv[1], flow, wide);
  check_initialize_from(flow, wide);
  nvpflow_free(flow);
  nvpflow_free(wide);
  return failures == 0 ? 0 : 1;
}
