/**
 * @file nvpflow.h
 * @brief The C interface of nvpflow: load a trained flow, score rows, run both directions, sample.
 *
 * Arrays are the caller's, row-major and contiguous: x and z are [rows, D] with D = nvpflow_input_size(), log_prob and
 * log_det are [rows], in nats. Functions that end in _f32 are for flows of dtype float32, those in _f64 for float64;
 * the other dtype is refused. An output must not overlap an input or another output. A row that holds NaN or inf gives
 * NaN in all of its own results and changes no other row. A finite row never gives NaN. Where numbers are too large for
 * the format, its log-density is -inf and its values are infinite. A log-determinant that cannot be computed is -inf
 * from nvpflow_forward and inf from nvpflow_inverse.
 *
 * Contexts. A flow with nvpflow_context_size() C > 0 is a density p(x | c). Functions with _context in their names take
 * its context, [context_rows, C] of the flow's dtype. context_rows is rows, a context for each row, or 1, one for all,
 * which is cheaper and gives the same bits. Where they sample it may be any number that divides rows. A context row
 * that holds NaN or inf counts as a row of x that does. For many calls under one context, nvpflow_condition_f32() makes
 * a flow that the functions without _context take. Those refuse a flow with a context, and functions with _context a
 * flow without one: NVPFLOW_INVALID_ARGUMENT. The message then names the function to call instead.
 *
 * Errors. Every function that can fail returns a status; no C++ exception leaves the library. After a status other
 * than NVPFLOW_OK nvpflow_last_error() says in one sentence what was wrong, and outputs hold nothing useful.
 *
 * Threads. Any number of threads may call the functions that take a `const nvpflow_flow*` on one flow at once. One
 * other may call nvpflow_reload() or nvpflow_swap() meanwhile: each call sees the old or the new parameters whole.
 * nvpflow_free() must be the last call on its flow.
 *
 * Real time. nvpflow_prepare(flow, max_rows) prepares a thread for calls with at most max_rows rows. If they succeed,
 * they neither allocate, nor lock, nor make a system call, nor use another thread. A call that fails also formats its
 * message, which allocates. The work does not depend on the values. It is one multiply-add per row and weight
 * (nvpflow_num_parameters() bounds the weights) and one activation per row and hidden unit. There are a tanh and an exp
 * per row and transformed feature, too. Every weight is read once per tile of rows. One context for all rows counts as
 * one row more, that of a conditioned flow as nothing.
 */
#ifndef NVPFLOW_H
#define NVPFLOW_H

#include <stddef.h>
#include <stdint.h>

#include <nvpflow/export.h>

#ifdef __cplusplus
extern "C" {
#endif

/** A trained flow. */
typedef struct nvpflow_flow nvpflow_flow;

/** The outcome of a call. The numbers are part of the interface and stay. */
typedef int32_t nvpflow_status;
enum {
  NVPFLOW_OK = 0,
  NVPFLOW_INVALID_ARGUMENT = 1, /**< a value, size or pointer is not acceptable */
  NVPFLOW_TYPE_MISMATCH = 2,    /**< _f32 on a float64 flow, or _f64 on a float32 flow */
  NVPFLOW_OUT_OF_MEMORY = 3,    /**< the flow remains usable */
  NVPFLOW_IO = 4,               /**< the operating system refused; nvpflow_system_error() holds errno */
  NVPFLOW_FILE_FORMAT = 5,      /**< a model file is damaged, foreign or newer than this library */
  NVPFLOW_UNAVAILABLE = 6,      /**< the instruction set that NVPFLOW_ISA asks for is not here */
  NVPFLOW_DEVICE = 7,           /**< CUDA cannot be used here, or a CUDA device failed */
  NVPFLOW_INTERNAL = 8          /**< a defect of the library: please report it with the message */
};

/** The type of parameters, arrays and arithmetic. */
typedef int32_t nvpflow_dtype;
enum { NVPFLOW_FLOAT32 = 0, NVPFLOW_FLOAT64 = 1 };

/** @return The library's version, "MAJOR.MINOR.PATCH". Never fails. */
NVPFLOW_API const char* nvpflow_version(void);

/**
 * @return The message of the last call on this thread that did not return NVPFLOW_OK; "" if there was none. It is in
 * UTF-8, except for quoted parts of a path. The text lies in memory of this thread, until its next failure. Longer
 * messages are cut off at 1023 bytes.
 */
NVPFLOW_API const char* nvpflow_last_error(void);

/** @return errno of the last failure on this thread where it was NVPFLOW_IO, else 0. */
NVPFLOW_API int nvpflow_system_error(void);

/**
 * @brief Reads a model file that nvpflow has written, for the CPU.
 * @param path  of a regular file
 * @param flow  receives the flow, to be given back by nvpflow_free(); NULL where loading fails
 *
 * Work: reads the file once, allocates about three times its size, of which twice the parameters' size stays.
 */
NVPFLOW_API nvpflow_status nvpflow_load(const char* path, nvpflow_flow** flow);

/**
 * @brief Reads a model file for a device.
 * @param path       of a regular file
 * @param device     "cpu", "cuda" or "cuda:N"; NULL: "cpu"
 * @param precision  of a float32 flow on a CUDA device: "float32", "tf32" or "bfloat16"; NULL: "float32"
 * @param weights    of a float32 flow on the CPU: "full" or "bfloat16"; NULL: "full"
 * @param flow       as of nvpflow_load()
 */
NVPFLOW_API nvpflow_status nvpflow_load_on(const char* path, const char* device, const char* precision,
                                           const char* weights, nvpflow_flow** flow);

/** @brief Gives a flow back. NULL is allowed. No call on the flow may be under way. */
NVPFLOW_API void nvpflow_free(nvpflow_flow* flow);

/** @name Properties of a flow. No work; -1 where `flow` is NULL.
 * @{ */
NVPFLOW_API int64_t nvpflow_input_size(const nvpflow_flow* flow);     /**< D, the columns of a row */
NVPFLOW_API nvpflow_dtype nvpflow_dtype_of(const nvpflow_flow* flow); /**< NVPFLOW_FLOAT32 or NVPFLOW_FLOAT64 */
NVPFLOW_API int64_t nvpflow_num_layers(const nvpflow_flow* flow);     /**< layers of all kinds */
NVPFLOW_API int64_t nvpflow_num_couplings(const nvpflow_flow* flow);  /**< coupling layers */
NVPFLOW_API int64_t nvpflow_num_parameters(const nvpflow_flow* flow); /**< elements of all parameters */
/** C, numbers of a context row; 0 where the flow's calls take no context, also of a conditioned flow. */
NVPFLOW_API int64_t nvpflow_context_size(const nvpflow_flow* flow);
/**
 * 1 where the flow is float32 and begins with a standardize layer, else 0. Such a flow takes and gives rows of data x
 * as float64, too, in the functions that end in _rows64. The layer is then applied in float64, so that values that are
 * large beside their spread keep their digits. Others refuse these functions with NVPFLOW_TYPE_MISMATCH.
 */
NVPFLOW_API int nvpflow_takes_float64_rows(const nvpflow_flow* flow);
/** @} */

/**
 * @brief Writes the whole specification as JSON text, as it stands in the model file.
 * @param flow      whose specification
 * @param text      receives at most `capacity` bytes, with a zero at the end; may be NULL where capacity is 0
 * @param capacity  bytes that `text` has room for
 * @param needed    receives the bytes of the whole text with its zero; may be NULL
 * @return NVPFLOW_INVALID_ARGUMENT where the text does not fit, unless capacity is 0
 */
NVPFLOW_API nvpflow_status nvpflow_spec_json(const nvpflow_flow* flow, char* text, size_t capacity, size_t* needed);

/**
 * @brief Writes the name of a column, in UTF-8; "" where the model has no names.
 * @param flow      whose column
 * @param column    from 0 to D - 1
 * @param text      receives at most `capacity` bytes, with a zero at the end; may be NULL where capacity is 0
 * @param capacity  bytes that `text` has room for
 * @param needed    receives the bytes of the whole name with its zero; may be NULL
 * @return NVPFLOW_INVALID_ARGUMENT where there is no such column, or the name does not fit, unless capacity is 0
 */
NVPFLOW_API nvpflow_status nvpflow_column_name(const nvpflow_flow* flow, int64_t column, char* text, size_t capacity,
                                               size_t* needed);

/**
 * @brief Writes the name of a number of the context, as nvpflow_column_name() writes that of a column.
 * @param flow      whose context
 * @param column    from 0 to C - 1; also of a conditioned flow, whose calls take no context any more
 * @param text      receives at most `capacity` bytes, with a zero at the end; may be NULL where capacity is 0
 * @param capacity  bytes that `text` has room for
 * @param needed    receives the bytes of the whole name with its zero; may be NULL
 * @return NVPFLOW_INVALID_ARGUMENT where there is no such number, or the name does not fit, unless capacity is 0
 */
NVPFLOW_API nvpflow_status nvpflow_context_name(const nvpflow_flow* flow, int64_t column, char* text, size_t capacity,
                                                size_t* needed);

/**
 * @brief Tells the limit of log p below which a row counts as unlikely, as it stands in the model file. It changes with
 * the parameters, by nvpflow_reload() and nvpflow_swap().
 * @param flow      whose threshold
 * @param log_prob  receives nats; NaN where the model has no threshold, so that no log p is below it
 * @param quantile  receives the share of rows that lay below it where it was found; NaN: unknown; may be NULL
 */
NVPFLOW_API nvpflow_status nvpflow_threshold(const nvpflow_flow* flow, double* log_prob, double* quantile);

/**
 * @brief Sets how many threads a call with many rows may use; small batches use fewer.
 * @param flow     whose calls
 * @param threads  1 keeps every call on its caller's thread. 0, the default: as many as this process may use by its
 *                 affinity mask, its cgroup's quota and NVPFLOW_NUM_THREADS, or else OMP_NUM_THREADS. This is counted
 *                 when the process makes its first flow.
 */
NVPFLOW_API nvpflow_status nvpflow_set_num_threads(nvpflow_flow* flow, int threads);

/**
 * @brief Prepares real-time use; see the head of this file. Call it on each thread that will make such calls.
 * @param flow      that the calls will use, or a larger one
 * @param max_rows  calls of at most so many rows stay on their caller's thread; 0: calls may use threads again. Of
 *                  several threads' numbers the largest counts, for all of them.
 *
 * Work: allocates and writes the calling thread's working memory, and scores one tile of rows. The memory stays until
 * the thread ends, and serves every flow that needs no more.
 */
NVPFLOW_API nvpflow_status nvpflow_prepare(const nvpflow_flow* flow, int64_t max_rows);

/**
 * @brief Replaces the parameters by those of a model file of the same specification, while other threads call the flow.
 * On failure the flow is as it was.
 *
 * Work: that of nvpflow_load(); waits, without blocking them, for calls under way on the old parameters.
 */
NVPFLOW_API nvpflow_status nvpflow_reload(nvpflow_flow* flow, const char* path);

/**
 * @brief Exchanges the parameters of two flows of the same specification, while other threads call them.
 * Each flow by itself changes at one moment; the two moments differ.
 */
NVPFLOW_API nvpflow_status nvpflow_swap(nvpflow_flow* a, nvpflow_flow* b);

/** @name A flow under one context, for many calls: x -> p(x | c).
 * @{ */
/**
 * @brief Makes a flow without a context of a flow with one and a context [C], which is copied.
 * @param flow         with nvpflow_context_size() > 0; it may be given back before or after `conditioned`
 * @param context      the numbers of one context row
 * @param conditioned  receives the flow, to be given back by nvpflow_free(); NULL on failure
 *
 * `conditioned` shares the parameters, the threads and the preparation of `flow`, and gives the bits of the functions
 * with _context. What the networks make of the context is computed here and not in its calls. Once the parameters of
 * `flow` have been replaced, each call computes it anew: make another one then. Functions that change a flow
 * (nvpflow_set_num_threads(), nvpflow_reload(), nvpflow_swap(), nvpflow_initialize_from_f32()) refuse `conditioned`.
 *
 * Work: one multiply-add per weight that reads the context. It allocates: where the context is new in every call, the
 * functions with _context are those for real time.
 */
NVPFLOW_API nvpflow_status nvpflow_condition_f32(const nvpflow_flow* flow, const float* context,
                                                 nvpflow_flow** conditioned);
NVPFLOW_API nvpflow_status nvpflow_condition_f64(const nvpflow_flow* flow, const double* context,
                                                 nvpflow_flow** conditioned);
/** @} */

/**
 * @brief Makes a flow whose base is N(0, T I) in place of N(0, I), T the temperature: the samples of T < 1 lie nearer
 * to the middle.
 * @param flow         with a normal base; it may be given back before or after `tempered`. Conditioned or not
 * @param temperature  1e-12 to 1e12. 1 is that of `flow`, of any base
 * @param tempered     receives the flow, to be given back by nvpflow_free(); NULL on failure
 *
 * `tempered` shares the parameters, the threads and the preparation of `flow`. nvpflow_log_prob_f32(),
 * nvpflow_sample_f32(), nvpflow_sample_and_log_prob_f32() and their variants take its temperature. The density
 * integrates to 1. nvpflow_forward_f32() and nvpflow_inverse_f32() depend on no base. Scores and gradients are those of
 * the temperature 1 alone: their functions refuse `tempered`, and so do those that change a flow. Unlike other calls,
 * those at a temperature allocate: latents of up to 2^20 elements.
 */
NVPFLOW_API nvpflow_status nvpflow_temper(const nvpflow_flow* flow, double temperature, nvpflow_flow** tempered);

/** @name What training sets from rows x [rows, D] before it begins. For rows in other units than those the flow was
 * trained on. Replaces parameters, as nvpflow_reload() does.
 *
 * - A standardize layer in front takes each column's mean and standard deviation. Where far rows decide the standard
 *   deviation it takes the median and the interquartile range.
 * - Actnorm layers are set such that their outputs have mean 0 and standard deviation 1.
 * - A context [rows, C] that the flow standardizes gives its mean and standard deviation.
 * @{ */
/** @brief Sets the layers from x [rows, D]; on failure the flow is as it was. */
NVPFLOW_API nvpflow_status nvpflow_initialize_from_f32(nvpflow_flow* flow, const float* x, int64_t rows);
NVPFLOW_API nvpflow_status nvpflow_initialize_from_f64(nvpflow_flow* flow, const double* x, int64_t rows);
/** @brief The same of a flow with a context, given a row of it for each row: context [rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_initialize_from_context_f32(nvpflow_flow* flow, const float* x, int64_t rows,
                                                               const float* context);
NVPFLOW_API nvpflow_status nvpflow_initialize_from_context_f64(nvpflow_flow* flow, const double* x, int64_t rows,
                                                               const double* context);
/** @} */

/** @name log p(x) = log N(z; 0, I) + log|det dz/dx| of each row, in nats.
 * @{ */
/** @brief Writes log_prob [rows] of x [rows, D]. */
NVPFLOW_API nvpflow_status nvpflow_log_prob_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                float* log_prob);
NVPFLOW_API nvpflow_status nvpflow_log_prob_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                double* log_prob);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_log_prob_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                   float* log_prob);
/** @brief Writes log_prob [rows] of x [rows, D] under context [context_rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_log_prob_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                        const float* context, int64_t context_rows, float* log_prob);
NVPFLOW_API nvpflow_status nvpflow_log_prob_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                        const double* context, int64_t context_rows, double* log_prob);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_log_prob_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                           const float* context, int64_t context_rows, float* log_prob);
/** @} */

/** @name Data to latent: z and log|det dz/dx|; log_det may be NULL.
 * @{ */
/** @brief Writes z [rows, D] and log_det [rows] of x [rows, D]. */
NVPFLOW_API nvpflow_status nvpflow_forward_f32(const nvpflow_flow* flow, const float* x, int64_t rows, float* z,
                                               float* log_det);
NVPFLOW_API nvpflow_status nvpflow_forward_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* z,
                                               double* log_det);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_forward_rows64(const nvpflow_flow* flow, const double* x, int64_t rows, float* z,
                                                  float* log_det);
/** @brief Writes z [rows, D] and log_det [rows] of x [rows, D] under context [context_rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_forward_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                       const float* context, int64_t context_rows, float* z,
                                                       float* log_det);
NVPFLOW_API nvpflow_status nvpflow_forward_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                       const double* context, int64_t context_rows, double* z,
                                                       double* log_det);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_forward_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                          const float* context, int64_t context_rows, float* z,
                                                          float* log_det);
/** @} */

/** @name Latent to data: x and log|det dx/dz|; log_det may be NULL.
 * @{ */
/** @brief Writes x [rows, D] and log_det [rows] of z [rows, D]. */
NVPFLOW_API nvpflow_status nvpflow_inverse_f32(const nvpflow_flow* flow, const float* z, int64_t rows, float* x,
                                               float* log_det);
NVPFLOW_API nvpflow_status nvpflow_inverse_f64(const nvpflow_flow* flow, const double* z, int64_t rows, double* x,
                                               double* log_det);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_inverse_rows64(const nvpflow_flow* flow, const float* z, int64_t rows, double* x,
                                                  float* log_det);
/** @brief Writes x [rows, D] and log_det [rows] of z [rows, D] under context [context_rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_inverse_context_f32(const nvpflow_flow* flow, const float* z, int64_t rows,
                                                       const float* context, int64_t context_rows, float* x,
                                                       float* log_det);
NVPFLOW_API nvpflow_status nvpflow_inverse_context_f64(const nvpflow_flow* flow, const double* z, int64_t rows,
                                                       const double* context, int64_t context_rows, double* x,
                                                       double* log_det);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_inverse_context_rows64(const nvpflow_flow* flow, const float* z, int64_t rows,
                                                          const float* context, int64_t context_rows, double* x,
                                                          float* log_det);
/** @} */

/** @name Rows first_row, first_row + 1, ... of the endless sample that `seed` names. Row i depends only on (seed, i).
 * @{ */
/** @brief Writes x [rows, D]. */
NVPFLOW_API nvpflow_status nvpflow_sample_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                              float* x);
NVPFLOW_API nvpflow_status nvpflow_sample_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                              double* x);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_sample_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                 int64_t rows, double* x);
/** @brief Writes x [rows, D] under context [context_rows, C], each row of it for rows / context_rows rows of x. */
NVPFLOW_API nvpflow_status nvpflow_sample_context_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                      int64_t rows, const float* context, int64_t context_rows,
                                                      float* x);
NVPFLOW_API nvpflow_status nvpflow_sample_context_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                      int64_t rows, const double* context, int64_t context_rows,
                                                      double* x);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_sample_context_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                         int64_t rows, const float* context, int64_t context_rows,
                                                         double* x);
/**
 * @brief The same rows, and log p of each: x [rows, D], log_prob [rows]. One pass; log p(x) of nvpflow_log_prob_f32()
 * differs by the rounding of x.
 */
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                           int64_t rows, float* x, float* log_prob);
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                           int64_t rows, double* x, double* log_prob);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_rows64(const nvpflow_flow* flow, uint64_t seed,
                                                              uint64_t first_row, int64_t rows, double* x,
                                                              float* log_prob);
/** @brief The same under context [context_rows, C], as nvpflow_sample_context_f32() takes it. */
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_context_f32(const nvpflow_flow* flow, uint64_t seed,
                                                                   uint64_t first_row, int64_t rows,
                                                                   const float* context, int64_t context_rows, float* x,
                                                                   float* log_prob);
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_context_f64(const nvpflow_flow* flow, uint64_t seed,
                                                                   uint64_t first_row, int64_t rows,
                                                                   const double* context, int64_t context_rows,
                                                                   double* x, double* log_prob);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_sample_and_log_prob_context_rows64(const nvpflow_flow* flow, uint64_t seed,
                                                                      uint64_t first_row, int64_t rows,
                                                                      const float* context, int64_t context_rows,
                                                                      double* x, float* log_prob);
/** @} */

/** @name The gradient of log p(x) by x, in nats per unit of x. They may allocate.
 * @{ */
/** @brief Writes score [rows, D] of x [rows, D]. */
NVPFLOW_API nvpflow_status nvpflow_score_f32(const nvpflow_flow* flow, const float* x, int64_t rows, float* score);
NVPFLOW_API nvpflow_status nvpflow_score_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* score);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_score_rows64(const nvpflow_flow* flow, const double* x, int64_t rows, float* score);
/** @brief Writes score [rows, D] of x [rows, D] under context [context_rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_score_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                     const float* context, int64_t context_rows, float* score);
NVPFLOW_API nvpflow_status nvpflow_score_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                     const double* context, int64_t context_rows, double* score);
/** @brief float64 rows x of a float32 flow: nvpflow_takes_float64_rows(). */
NVPFLOW_API nvpflow_status nvpflow_score_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                        const float* context, int64_t context_rows, float* score);
/** @} */

/** @name The mean negative log-likelihood of x [rows, D], in nats, and its gradient. At least one row. They may
 * allocate.
 * @{ */
/** @brief Writes nll [1], and gradient [nvpflow_num_parameters()] in the order of the model file's tensors. */
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_f32(const nvpflow_flow* flow, const float* x, int64_t rows, double* nll,
                                                    float* gradient);
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                    double* nll, double* gradient);
/** @brief The same of -log p(x | c), under context [context_rows, C]. */
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                            const float* context, int64_t context_rows, double* nll,
                                                            float* gradient);
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                            const double* context, int64_t context_rows, double* nll,
                                                            double* gradient);
/** @brief The mean by weight, -sum w log p / sum w, of sample_weight w [rows]: finite, at least 0, not all 0. A row of
 * weight 0 is not looked at. */
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_weighted_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                             const double* sample_weight, double* nll, float* gradient);
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_weighted_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                             const double* sample_weight, double* nll,
                                                             double* gradient);
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_weighted_context_f32(const nvpflow_flow* flow, const float* x,
                                                                     int64_t rows, const double* sample_weight,
                                                                     const float* context, int64_t context_rows,
                                                                     double* nll, float* gradient);
NVPFLOW_API nvpflow_status nvpflow_nll_gradient_weighted_context_f64(const nvpflow_flow* flow, const double* x,
                                                                     int64_t rows, const double* sample_weight,
                                                                     const double* context, int64_t context_rows,
                                                                     double* nll, double* gradient);
/** @} */

#ifdef __cplusplus
}
#endif

#endif
